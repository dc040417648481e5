"""The learned soups of a run: where they start, what they learn from, and what they cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from mergesearch.checkpoints.measured import write_measured
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError
from mergesearch.evaluate.losses import Losses
from mergesearch.evaluate.scoring import Scorer
from mergesearch.recipe import BASE, Recipe, Rule, TensorInfo, single_rule
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.lines import Documents as DocumentsScored
from mergesearch.search.lines import Found, Line, LineRace
from mergesearch.search.objective import Objective
from mergesearch.search.soup.adam import learn, parent_scales, step_seconds
from mergesearch.search.soup.affine import affine_of
from mergesearch.search.soup.closed_forms import Averaging, own_documents
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.folds import learn_by_folds
from mergesearch.search.soup.foreseen import Foreseen, foreseen
from mergesearch.search.soup.full import Measuring
from mergesearch.search.soup.learning import Documents, StateDoesNotFit, Stepped, hold_apart, shuffled
from mergesearch.search.soup.memo import Memo
from mergesearch.search.soup.settings import MEASURED, Loss, SoupSettings
from mergesearch.search.work import Work
from mergesearch.space import frozen_rules, groups_of

log: logging.Logger = logging.getLogger(__name__)

# of the metric's unit, the least that the probability of what is right counts as
LEAST_SHARE = 0.25
# the loss of a likelihood: every task that has any loss has it
CROSS_ENTROPY: Loss = "cross_entropy"
# what no task need say anything for
ENTROPY: Loss = "entropy"
# metrics whose mean is 1 less an expected loss, or that loss: their unit is that of the loss
LIKE_EXPECTED_LOSS = ("acc", "acc_norm", "acc_bytes", "exact_match", "bits_per_byte", "gold_prob")
# of a task of likelihoods, whose loss is in nats and no chance
PERPLEXITY = "perplexity"
# softmax weights are positive
LEAST_SOFTMAX = 1e-3
# in the run folder: what was measured of the models, which recipes name
STATISTICS = "statistics"
# the weight of each model where there is no mix to start from
START = 0.4
# where the study notes what losses were measured by
_SCALES = "scales of"
# in the key of the trial that paid for them: the document evaluations that these took
_MEASURED_FOR = "measured"
# how far apart the seeds of a soup's rounds are
_ROUND = 1_000_003


class Learner:
    """Learns the soups that `search.learned_soup` asks for.

    Args:
        config: the run's configuration.
        engine: its live model becomes the candidate of every step.
        scorer: of that model on the search documents.
        infos, layers: of the pool.
        documents: the search documents by task; those of guards alone are not learned from.
        say: told in a few words what is unusual.
        stepped: told after every step of learning how far it is.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        scorer: Scorer,
        infos: Sequence[TensorInfo],
        layers: int,
        documents: Mapping[str, Sequence[int]],
        say: Callable[[str], None] = log.info,
        stepped: Stepped = lambda step: None,
    ):
        self.config = config
        self.engine = engine
        self.scorer = scorer
        self.say = say
        self.stepped = stepped
        self.settings: SoupSettings = config.search.key("learned_soup", SoupSettings)
        self.infos: list[TensorInfo] = list(infos)
        self.layers = layers
        self._frozen = frozen_rules(config.space, tuple(config.models))
        wanted = {task.task: task.weight for task in config.tasks}
        self.documents: dict[str, list[int]] = {label: list(ids) for label, ids in documents.items() if label in wanted}
        self.weights = wanted
        self._losses: dict[str, Losses] = {}
        self._parent_scales: dict[str, dict[str, float]] = {}

    @property
    def gradients(self) -> bool:
        """Whether it learns by gradients, as far as the settings and the tasks allow it."""
        return self._gradients

    @cached_property
    def _gradients(self) -> bool:
        """Adam where every task says what is right; else CMA-ES, which needs scores alone."""
        if self.settings.optimizer != "adam":
            return False
        why = why_no_gradients(self.settings, self.documents, self.losses)
        if why is not None:
            self.say(f"learned soup without gradients, by CMA-ES: {why}")
        return why is None

    def losses(self, loss: Loss) -> Losses:
        """Of the search documents.

        Raises:
            UserError: a task does not allow losses.
        """
        if loss not in self._losses:
            scorer = self.scorer.only(self.documents) if self.config.guard else self.scorer
            self._losses[loss] = Losses(scorer, self.engine.model, self.settings.batch_size, loss)
        return self._losses[loss]

    def learn(
        self,
        per: str,
        loss: Loss | None,
        start: Recipe | None,
        work: Work,
        times: int = 1,
        steps: int | None = None,
    ) -> Recipe:
        """The recipe with what is learned on one part of the search documents and kept by another, see `adam.learn`;
        with several folds, and documents for them, what is learned on parts and chosen by the others, see `folds`.

        It goes on from where it stood. What was kept by another version, or is damaged, is of no use: it begins anew.

        Args:
            per: `recipe`, `group` or `tensor`: what has coefficients of its own.
            loss: of `settings.Loss`; without gradients none is needed.
            start: a mix to start from; None for the configured weight.
            work: the run so far, with the objective and the parents' scores, and where to tell what it costs.
            times: which round of a soup this is, from 1; documents come in another order in each, and the part that
                says how far to go is the same, so that no round has learned from it.
            steps: of Adam; None for those of the settings.

        Raises:
            UserError, CandidateError: as for `adam.learn`.
        """
        while True:
            try:
                return self._learn(per, loss, start, work, times, steps)
            except StateDoesNotFit as error:
                self.say(f"learned soup per {per}: it begins anew, what was kept of it does not fit or is damaged")
                error.path.unlink()

    def _learn(
        self, per: str, loss: Loss | None, start: Recipe | None, work: Work, times: int, steps: int | None
    ) -> Recipe:
        coefficients = self.coefficients(per)
        start_values = self.start(coefficients, start)
        soup, seed = self.settings, self.config.search.seed
        soup = soup if steps is None else soup.model_copy(update={"steps": steps})
        work.state.parent.mkdir(parents=True, exist_ok=True)
        told: dict[str, Any] = {
            "seed": seed,
            "weights": self.weights,
            "state": work.state,
            "spent": work.spent,
            "stop": work.stop,
            "say": lambda text: self.say(f"learned soup per {per}: {text}"),
            "stepped": self.stepped,
        }
        losses = self.losses(loss) if loss is not None and self.gradients else None
        documents, held = hold_apart(self.documents, soup.validation or MEASURED, seed, soup.validation_documents)
        if losses is None:
            score, without = self._score(objective_of(work.history)), soup.model_copy(update={"optimizer": "cmaes"})
            parts: dict[str, Any] = {"documents": documents, "validation": held, "score": score}
            return learn(coefficients, start_values, self.engine, None, without, **parts, **told).recipe
        told["scales"] = self._scales(losses, coefficients, held, work)
        known = losses.known(self.documents)
        if soup.folds > 1 and min(map(len, known.values())) >= soup.folds:
            learned = learn_by_folds(
                coefficients, start_values, self.engine, losses, soup, documents=self.documents, **told
            )
            kept = [look["validation"] for look in learned.history if look["kept"]]
            work.note({"held_out": [kept[0], kept[-1]]})
            return learned.recipe
        parts = {"documents": documents, "validation": held}
        if not soup.validation:
            parts = {"documents": self.documents, "validation": {}}
        told |= {"seed": seed + _ROUND * (times - 1), "again": times > 1}
        return learn(coefficients, start_values, self.engine, losses, soup, **parts, **told).recipe

    def seconds_a_document(self) -> float | None:
        """What a document evaluation takes in learning, on a step of the first soup; None without gradients."""
        per, loss = self.settings.soups[0]
        if not self.gradients or loss is None:
            return None
        coefficients, known = self.coefficients(per), self.losses(cast(Loss, loss)).known(self.documents)
        start = self.start(coefficients, None)
        return step_seconds(coefficients, start, self.engine, self.losses(cast(Loss, loss)), self.settings, known)

    def closed_form(self, name: str, solve: Averaging, work: Work) -> Recipe:
        """The weights that a closed form gives, from as many documents of each task as the soups look at.

        Args:
            name: the strategy's.
            solve: of `closed_forms`.
            work: the run so far, with the models' scores, and where to tell what it costs.

        Raises:
            CandidateError: the tasks do not say what is right.
        """
        own, coefficients = self._own(name, work)
        values = solve(coefficients, self.engine, self.losses(CROSS_ENTROPY), own, spent=work.spent)
        recipe = coefficients.recipe(values)
        return recipe.model_copy(update={"rules": (*self._frozen, *recipe.rules)})

    def full_form(self, name: str, kind: Literal["inputs", "squares"], measure: Measuring, work: Work) -> Recipe:
        """The recipe of a method that goes by what is measured of each model, on the documents of `closed_form`.

        Args:
            name: the strategy's.
            kind: of what is measured.
            measure: of `full`.
            work: as for `closed_form`.

        Raises:
            CandidateError: the tasks do not say what is right.
        """
        own, coefficients = self._own(name, work)
        losses = self.losses(CROSS_ENTROPY)
        known = {model: {t: ids for t, ids in losses.known(of).items() if ids} for model, of in own.items()}
        measured = write_measured(
            Path(self.config.folder) / STATISTICS / name,
            kind,
            known,
            lambda writer: measure(writer, coefficients, self.engine, losses, own, spent=work.spent),
        )
        rules = single_rule("regmean" if kind == "inputs" else "fisher")
        recipe = self.config.recipe((*self._frozen, *rules))
        return recipe.model_copy(update={"statistics": measured})

    def foreseen(self, measure: Measuring) -> Foreseen | None:
        """What `full_form` will take to measure; None where the tasks do not say what is right, or it takes long to
        find out. The live model is anything afterwards.

        Args:
            measure: of `full`.
        """
        if not self.gradients or set(self.settings.loss) == {ENTROPY}:
            return None
        average, losses = self.config.average, self.losses(CROSS_ENTROPY)
        first = next(iter(average.models))
        alone = average.model_copy(update={"models": {first: average.models[first]}})
        coefficients = Coefficients(alone, self.infos, "tensor", method="linear")
        known = {label: ids for label, ids in losses.known(self.documents).items() if ids}

        def one(writer: Any, documents: Documents) -> None:
            measure(writer, coefficients, self.engine, losses, {first: documents})

        return foreseen(one, known, len(average.models), self.settings.validation_documents)

    def _own(self, name: str, work: Work) -> tuple[dict[str, dict[str, list[int]]], Coefficients]:
        """For each model the documents of a closed form, and the average, tensor by tensor."""
        if not self.gradients or set(self.settings.loss) == {ENTROPY}:
            raise CandidateError(f"{name} needs tasks that say what is right: leave it out")
        most, seed = self.settings.validation_documents, self.config.search.seed
        few = {label: sorted(shuffled(ids, "closed form", seed, label)[:most]) for label, ids in self.documents.items()}
        own = own_documents(few, {model: work.history.signed(model) for model in self.config.models})
        return own, Coefficients(self.config.average, self.infos, "tensor", method="linear")

    def sweep(self, lines: Sequence[Line], budget: int, known: Mapping[str, DocumentsScored], work: Work) -> Found:
        """The best points of some lines, raced on few of the search documents; see `lines`.

        Args:
            lines: at least one.
            budget: document evaluations.
            known: what baselines did on all documents, by name.
            work: the run so far, with the objective, and where to tell what it costs.

        Raises:
            CandidateError: no point could be built and scored.
        """
        seed, history = self.config.search.seed, work.history
        orders = {label: shuffled(ids, "sweep", seed, label) for label, ids in self.documents.items()}
        scores = next(iter(history.complete()), next(trial for trial in history.trials if trial.scores)).scores
        memo = Memo(work.state, json.dumps([seed, self.config.dtype, orders]), work.spent)

        def score(rules: tuple[Rule, ...], documents: Mapping[str, Sequence[int]]) -> DocumentsScored:
            recipe = self.config.recipe((*self._frozen, *rules))
            return memo.scored(recipe.id, documents, lambda: self._scored(recipe, documents))

        factors = objective_of(history).factors(scores)
        return LineRace(lines, factors, orders, budget, score, known).run()

    def _scored(self, recipe: Recipe, documents: Documents) -> DocumentsScored:
        self.engine.load(recipe)
        return self.scorer.only(documents).score().documents

    def _scales(
        self,
        losses: Losses,
        coefficients: Coefficients,
        documents: Documents,
        work: Work,
    ) -> dict[str, float] | None:
        """What each task's loss is divided by: as in the objective, the way from the base to the best model.

        An expected loss is 1 - p(what is right), whose mean the parents' scores have already, or a metric that counts
        the same; the mixed loss is hardly more. Every other loss is measured on some documents.
        """
        if losses.kind == ENTROPY:
            return dict.fromkeys(self.documents, 1.0)  # nats are nats, and parents far from sure are no measure
        expected = losses.kind in ("expected", "mixed")
        if self.config.objective.scale != "parents":
            return dict.fromkeys(self.documents, 1.0) if expected else None
        known = {task: self._unit(task, work.history) for task in self.documents} if expected else {}
        where, study = f"{_SCALES} {losses.kind}", work.history.study
        kept = self._parent_scales.setdefault(losses.kind, dict(store.noted(study, where) or {}))
        work.spent(work.key.get(_MEASURED_FOR, 0))
        missing = {task: ids for task, ids in documents.items() if known.get(task) is None and task not in kept}
        if missing:
            paid: list[int] = []

            def pay(count: int) -> None:
                paid.append(count)
                work.spent(count)

            kept |= parent_scales(coefficients, self.engine, losses, missing, pay)
            # a run that is started again would pay for them again, and have less to search with
            store.note(study, where, kept)
            work.note({_MEASURED_FOR: sum(paid)})
        return kept | {task: unit for task, unit in known.items() if unit is not None}

    def _unit(self, task: str, history: History) -> float | None:
        """Of an expected loss, from what the parents' scores say; None where they say nothing."""
        unit = abs(objective_of(history).scales[task].unit)
        scores = {name: history.scores(name).get(task) for name in (BASE, *self.config.models)}
        if any(score is not None and score.metric == PERPLEXITY for score in scores.values()):
            return None  # its loss is in nats
        gold = {name: score.gold for name, score in scores.items() if score is not None and score.gold is not None}
        if BASE not in gold or len(gold) < 2:
            metrics = {score[task].metric for name in scores if task in (score := history.scores(name))}
            return unit if metrics <= set(LIKE_EXPECTED_LOSS) else None
        gain = max(value for name, value in gold.items() if name != BASE) - gold[BASE]
        # a gain within noise would let its task drown the others
        return max(gain, LEAST_SHARE * unit)

    def coefficients(self, per: str) -> Coefficients:
        """What is learned."""
        soup = self.settings
        cells: Any = per
        free = [info for info in self.infos if not any(rule.covers(info) for rule in self._frozen)]
        ranges = min(soup.layer_groups, self.layers)
        groups = groups_of(free, self.layers, ranges, soup.components, "search.learned_soup") if per != "recipe" else []
        if per == "group":
            cells = groups
        return Coefficients(
            self.config.average,
            self.infos,
            cells,
            method=soup.method,
            parameterisation=soup.coefficients,
            frozen=self._frozen,
            above=groups if self.gradients else None,
        )

    def start(self, coefficients: Coefficients, recipe: Recipe | None) -> np.ndarray:
        """The first weights: those of a mix, for each cell the mean over its tensors; else the configured one."""
        mix = affine_of(recipe, coefficients.models) if recipe is not None else None
        if recipe is None or mix is None:
            return coefficients.full(START if self.settings.start is None else self.settings.start)
        free = [info for info in self.infos if info.name in coefficients.cell_of]
        rows = [mix.values[recipe.rules.index(recipe.rule_for(info))] for info in free]
        cells = np.array([coefficients.cell_of[info.name] for info in free])
        values = np.stack([_mean(np.asarray(rows)[cells == cell]) for cell in range(coefficients.shape[0])])
        return np.maximum(values, LEAST_SOFTMAX) if coefficients.parameterisation == "softmax" else values

    def _score(self, objective: Objective) -> Callable[[Mapping[str, Sequence[int]]], float]:
        everything = self.scorer.only(self.documents) if self.config.guard else self.scorer

        def score(documents: Mapping[str, Sequence[int]]) -> float:
            whole = all(set(documents.get(label, ())) == set(ids) for label, ids in self.documents.items())
            scorer = everything if whole else self.scorer.only(documents)
            return objective.ranking(scorer.score().tasks)

        return score


def why_no_gradients(settings: SoupSettings, documents: Documents, losses: Callable[[Loss], Losses]) -> str | None:
    """Why soups cannot be learned by gradients, in words; None where they can.

    Args:
        documents: the search documents by task.
        losses: of these documents, by their kind.
    """
    try:
        # entropies alone need no answers
        known = losses(ENTROPY if set(settings.loss) == {ENTROPY} else CROSS_ENTROPY).known(documents)
    except UserError as error:
        return str(error)
    missing = next((label for label, ids in known.items() if not ids), None)
    return None if missing is None else f"task {missing!r} does not say what is right"


def _mean(rows: np.ndarray) -> np.ndarray:
    """Of equal rows that row: their mean need not be, and a soup begun there would be another recipe."""
    return rows[0] if (rows == rows[0]).all() else rows.mean(axis=0)


def objective_of(history: History) -> Objective:
    """The objective of a run whose parents are scored.

    Raises:
        CandidateError: they are not.
    """
    if history.objective is None:
        raise CandidateError("a soup is learned after the parents are scored, which fix the objective's scale")
    return history.objective
