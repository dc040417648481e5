"""The search: baselines first, then what the study proposes, each trial in the storage the moment it ends."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config, RacingConfig
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import TaskScore, load_documents
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.search import objective as objectives
from mergesearch.search.baselines import AVERAGE, BASE, parent_names
from mergesearch.search.history import History, feasible, hours_at_work, recipe_of, scores_of
from mergesearch.search.objective import Objective
from mergesearch.search.racing import OTHERS, Best, race, spreads
from mergesearch.search.record import Record
from mergesearch.search.samplers import Choice, SeededPerTrial
from mergesearch.search.store import WARM, RunFolder, Worker, abandoned, objective_of, open_study, to_record
from mergesearch.search.strategies import OPEN_ENDED, Proposal, Wait, Wanted, strategies_of, wanted
from mergesearch.search.strategies.stages import Stages
from mergesearch.space import Space

log = logging.getLogger(__name__)

LIBRARIES = ("mergesearch", "torch", "transformers", "lm_eval", "optuna")
WAIT_SECONDS = 1.0  # seconds between looks at what other workers are doing


class Builds(Protocol):
    """The part of the engine that a search needs: makes the live model a recipe's candidate, returns seconds."""

    def load(self, recipe: Recipe) -> float: ...


class DocumentScores(Protocol):
    tasks: dict[str, TaskScore]
    seconds: float

    def save_documents(self, path: Any) -> None: ...


class Scores(Protocol):
    """The part of the scorer that a search needs: scores the live model as it is now. With racing, `Blocks` too."""

    def score(self) -> DocumentScores: ...


class Learns(Protocol):
    """Finds the coefficients of a soup on the search documents, from the best mix so far.

    Attributes:
        gradients: whether the tasks allow it to learn by gradients.
    """

    gradients: bool

    def learn(
        self,
        per: str,
        loss: str | None,
        start: Recipe | None,
        history: History,
        state: Path,
        spent: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> Recipe: ...


class SearchFailed(Exception):
    """The search cannot go on, and why."""


class Search:
    """One worker of one run. Any number of them may share the storage; there is no coordinator.

    Args:
        config: the run's configuration.
        folder: its run folder.
        space: what may be proposed.
        engine: builds candidates.
        scorer: scores the live model.
        coarse: the space that the study begins with, where it grows.
        infos, layers: the pool's tensors, where a stage of the study refines a recipe group by group.
        learner: learns soups; without it there are none.
        warm: recipes to try first.
        started: called with the record of each trial that begins.
        finished: called with the record of each trial that ends, in the order in which they end here.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        space: Space,
        engine: Builds,
        scorer: Scores,
        *,
        coarse: Space | None = None,
        infos: Sequence[TensorInfo] = (),
        layers: int = 0,
        learner: Learns | None = None,
        warm: Sequence[Recipe] = (),
        started: Callable[[Record], None] = lambda record: None,
        finished: Callable[[Record], None] = lambda record: None,
        device: str = "cpu",
    ):
        self.config = config
        self.folder = folder
        self.space = space
        self.engine = engine
        self.scorer = scorer
        self.learner = learner
        self._started = started
        self._finished = finished
        self._machine = machine(device)
        self.study = open_study(config, folder)
        if WARM not in self.study.user_attrs:
            self.study.set_user_attr(WARM, [recipe.dump() for recipe in warm])
        self.stages = Stages(config, space, coarse, infos, layers)
        self._sampler = self.study.sampler = SeededPerTrial(config.search.seed, self._choice)
        self._began = len(self.study.get_trials(deepcopy=False))
        self.strategies = strategies_of(
            config, self.stages, learner is not None, warm, self._began, lambda: learner is None or learner.gradients
        )
        self._arranged = False

    def run(self) -> None:
        """Scores what the budget allows; called again, goes on from what is in the storage.

        Raises:
            SearchFailed: the base or every model failed, so no objective can be computed.
            KeyboardInterrupt: passed on; the trial at work is taken up by the next start.
        """
        with Worker(self.folder) as worker:
            while (trial := self._take(worker)) is not None:
                self._work(trial)
                self._settle()

    # --- what to do next ---

    def _history(self) -> History:
        return History(self.study, self.config)

    def _take(self, worker: Worker) -> optuna.Trial | None:
        """The next trial to work on: one that an ended worker left, a waiting one, or what a strategy proposes."""
        while True:
            with self.folder.lock("take"):
                trial = self._left_behind(worker) or self._ask()
                if isinstance(trial, optuna.Trial):
                    trial.set_user_attr("worker", worker.id)
                    trial.set_user_attr("taken", datetime.now().isoformat())
                    return trial
            if trial is None:
                return None
            time.sleep(WAIT_SECONDS)

    def _left_behind(self, worker: Worker) -> optuna.Trial | None:
        left = abandoned(self.study, worker)
        return optuna.Trial(self.study, left._trial_id) if left else None

    def _ask(self) -> optuna.Trial | Wait | None:
        if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return self.study.ask()
        history = self._history()
        for position, strategy in enumerate(self.strategies):
            if strategy.budgeted and history.spent_but(*self._kept(position, history)):
                continue
            found = strategy.next(history)
            if isinstance(found, Wait):
                return found
            if found is not None:
                self._enqueue(strategy.name, found)
                return self.study.ask()
        return None

    def _kept(self, position: int, history: History) -> Wanted:
        """What a strategy without an end leaves to those that come after it."""
        if self.strategies[position].name not in OPEN_ENDED:
            return Wanted()
        return wanted(self.strategies[position + 1 :], history)

    def _enqueue(self, strategy: str, found: Proposal) -> None:
        attributes = {"strategy": strategy, **found.attributes}
        if found.name:
            attributes["name"] = found.name
        if found.recipe:
            attributes |= {"recipe": found.recipe.dump(), "recipe_id": found.recipe.id}
        self.study.enqueue_trial({}, user_attrs=attributes)

    def _choice(self, trial: FrozenTrial) -> Choice:
        if "recipe" in trial.user_attrs or "per" in trial.user_attrs:
            return Choice("random")  # it is not sampled
        if trial.user_attrs.get("strategy") != "study":
            return Choice("random")
        return self.stages.choice(trial, self._history())

    # --- one trial ---

    def _work(self, trial: optuna.Trial) -> None:
        if "stopped" in trial.user_attrs:  # its worker ended before it told
            self._prune(trial)
        if "scores" in trial.user_attrs or "stopped" in trial.user_attrs:  # only the objective is missing
            return
        try:
            recipe = self._recipe(trial)
            self._started(self._record(trial.number))
            self._build_and_score(trial, recipe)
        except OSError as error:
            raise SearchFailed(
                f"trial {trial.number} could not be recorded ({error}): the same command goes on"
            ) from error
        except Exception as error:
            log.debug("trial %d failed", trial.number, exc_info=True)
            self._fail(trial, str(error) if isinstance(error, CandidateError) else f"{type(error).__name__}: {error}")

    def _recipe(self, trial: optuna.Trial) -> Recipe:
        stated = trial.user_attrs.get("recipe")
        if stated:
            recipe = Recipe.from_data(stated, f"trial {trial.number}")
            self._state_parameters(trial, recipe)
            return recipe
        recipe = self._learned(trial) if "per" in trial.user_attrs else self._space(trial).suggest(trial)
        if "per" in trial.user_attrs:
            self._state_parameters(trial, recipe)
        trial.set_user_attr("recipe", recipe.dump())
        trial.set_user_attr("recipe_id", recipe.id)
        return recipe

    def _space(self, trial: optuna.Trial) -> Space:
        return self.stages.space_of(self.study.get_trials(deepcopy=False)[trial.number], self._history())

    def _state_parameters(self, trial: optuna.Trial, recipe: Recipe) -> None:
        """Gives a trial whose recipe no sampler chose the parameters that would have proposed it, where the space holds
        it, so that samplers learn from it."""
        space = self._space(trial)
        found = space.parameters(recipe)
        if found is not None:
            with self._sampler.stating(found):
                space.suggest(trial)

    def _learned(self, trial: optuna.Trial) -> Recipe:
        if self.learner is None:
            raise CandidateError("soups cannot be learned here")
        spent = 0  # one that is taken up again tells first what it cost before

        def more(documents: int) -> None:
            nonlocal spent
            spent += documents
            trial.set_user_attr("documents_learning", spent)

        start = trial.user_attrs.get("start")
        recipe = None if start is None else recipe_of(self.study.get_trials(deepcopy=False)[start])
        learning = self.folder.learning(trial.number)
        per, loss = trial.user_attrs["per"], trial.user_attrs.get("loss")
        trial.set_user_attr("gradients", self.learner.gradients)
        return self.learner.learn(per, loss, recipe, self._history(), learning, more, lambda: self._over(trial.number))

    def _over(self, number: int) -> bool:
        """Whether documents or hours are used up by what has ended and by a trial that is at work."""
        budget = self.config.search
        if budget.documents is None and budget.hours is None:  # it is asked before every step of a soup
            return False
        history = self._history()
        return history.used_up(hours=hours_at_work(history.trials[number]))

    def _build_and_score(self, trial: optuna.Trial, recipe: Recipe) -> None:
        trial.set_user_attr("machine", self._machine)
        if self._copy_equal(trial, recipe):
            return
        if self.config.racing and self._may_race(trial):
            self._race(trial, recipe, self.config.racing)
            return
        self._keep(trial, self.engine.load(recipe), self.scorer.score())

    def _may_race(self, trial: optuna.Trial) -> bool:
        """Scale, report and the races themselves need the parents and the average on all documents; a greedy soup is
        compared with the soup before it, which need not be the best trial."""
        if trial.user_attrs.get("name") in (*parent_names(self.config), AVERAGE):
            return False
        if trial.user_attrs.get("strategy") == "greedy_soup" or objective_of(self.study) is None:
            return False
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _keep(self, trial: optuna.Trial, merge_seconds: float, found: DocumentScores) -> None:
        found.save_documents(self.folder.documents(trial.number))
        trial.set_user_attr("merge_seconds", merge_seconds)
        trial.set_user_attr("score_seconds", found.seconds)
        # last, because a trial that has it is not scored again
        trial.set_user_attr("scores", {task: asdict(score) for task, score in found.tasks.items()})

    def _copy_equal(self, trial: optuna.Trial, recipe: Recipe) -> bool:
        """The scores of an earlier trial that does the same to every tensor, where there is one."""
        identify = getattr(self.engine, "identity", None)
        same = identify(recipe) if identify else recipe.id
        trial.set_user_attr("same", same)
        for other in self.study.get_trials(deepcopy=False):
            found = other.user_attrs
            if other.number == trial.number or found.get("same") != same or "scores" not in found:
                continue
            documents = self.folder.documents(other.number)
            if documents.is_file():
                shutil.copyfile(documents, self.folder.documents(trial.number))
            trial.set_user_attr("same_as", other.number)
            trial.set_user_attr("merge_seconds", 0.0)
            trial.set_user_attr("score_seconds", 0.0)
            trial.set_user_attr("scores", found["scores"])
            return True
        return False

    # --- racing ---

    def _race(self, trial: optuna.Trial, recipe: Recipe, racing: RacingConfig) -> None:
        spent: list[float] = []
        blocks = self.folder.blocks(recipe.id)
        self._arrange()
        outcome = race(
            self.scorer,
            self._best(),
            self._factors(),
            racing.error,
            blocks,
            lambda: spent.append(self.engine.load(recipe)),
        )
        if outcome.stopped is None:
            self._keep(trial, sum(spent), outcome.scores)
            shutil.rmtree(blocks, ignore_errors=True)
            return
        trial.set_user_attr("merge_seconds", sum(spent))
        trial.set_user_attr("score_seconds", outcome.scores.seconds)
        trial.set_user_attr("blocks", outcome.blocks)
        trial.set_user_attr("partial", {task: asdict(score) for task, score in outcome.scores.tasks.items()})
        trial.set_user_attr("stopped", outcome.stopped)
        self._prune(trial)

    def _prune(self, trial: optuna.Trial) -> None:
        """Tells the study, with the objective on the documents so far, by which samplers rank pruned trials."""
        found = trial.user_attrs
        objective = objective_of(self.study)
        value = objective.ranking({task: TaskScore(**data) for task, data in found["partial"].items()})
        trial.report(value, step=found["blocks"])
        self.study.tell(trial, state=TrialState.PRUNED)
        self._finished(self._record(trial.number))

    def _best(self) -> Best | None:
        """The best finished trial whose documents are here and that breaks no guard."""
        ranked = [trial for trial in self._history().complete() if feasible(trial)]
        there = [trial for trial in ranked if self.folder.documents(trial.number).is_file()]
        if not there:
            return None
        best, rest = there[0], sorted(there[1:], key=lambda trial: trial.number)
        # the baselines, and the latest of the others
        named = [t.number for t in rest if t.user_attrs.get("name")]
        late = [t.number for t in rest if not t.user_attrs.get("name")][-OTHERS:]
        documents = [load_documents(self.folder.documents(number)) for number in (best.number, *named, *late)]
        return Best(best.number, documents[0], documents[1:])

    def _arrange(self) -> None:
        """Draws the blocks once, from the parents' scores: the same for every trial, worker and start."""
        if self._arranged:
            return
        if "spread" not in self.study.user_attrs:
            wanted = set(parent_names(self.config))
            parents = [t.number for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("name") in wanted
                       and "scores" in t.user_attrs and self.folder.documents(t.number).is_file()]  # fmt: skip
            found = [load_documents(self.folder.documents(number)) for number in parents]
            self.study.set_user_attr("spread", spreads(found, self._factors()) if len(found) > 1 else None)
        self.scorer.arrange(self.study.user_attrs["spread"])
        self._arranged = True

    def _factors(self) -> dict[str, float]:
        objective = objective_of(self.study)
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        scores = {task: TaskScore(**data) for task, data in complete[0].user_attrs["scores"].items()}
        return objective.factors(scores)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr("error", reason)
        self.study.tell(trial, state=TrialState.FAIL)
        self._finished(self._record(trial.number))

    # --- objective ---

    def _settle(self) -> bool:
        """Gives every scored trial its objective once the parents have fixed the scale. True where any was given."""
        objective = objective_of(self.study) or self._fix_objective()
        if objective is None:
            return False
        given = False
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "scores" in trial.user_attrs:
                given = self._give(trial, objective) or given
        return given

    def _give(self, trial: FrozenTrial, objective: Objective) -> bool:
        scores = scores_of(trial)
        values = objective.values(scores) if self.config.objective.pareto else objective.ranking(scores)
        try:
            for task, excess in objective.excess(scores).items():
                if task not in trial.constraints:
                    optuna.Trial(self.study, trial._trial_id).set_constraint(task, excess)
            self.study.tell(trial.number, values)
        except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):
            return False  # another worker was faster
        self._finished(self._record(trial.number))
        return True

    def _fix_objective(self) -> Objective | None:
        """The objective as the parents' scores fix it; None while one of them is still to be scored."""
        by_name = {trial.user_attrs.get("name"): trial for trial in self.study.get_trials(deepcopy=False)}
        found: dict[str, dict[str, TaskScore]] = {}
        for name in parent_names(self.config):
            trial = by_name.get(name)
            if trial is None or self._to_retry(trial):
                return None
            if trial.state != TrialState.FAIL and "scores" not in trial.user_attrs:
                return None
            if trial.state != TrialState.FAIL:
                found[name] = {task: TaskScore(**data) for task, data in trial.user_attrs["scores"].items()}
        objective = self._objective(found, by_name)
        try:
            objective = objectives.with_conditions(objective, self.config, found)
        except LookupError as error:
            raise SearchFailed(str(error)) from None
        self.study.set_user_attr("objective", objective.to_data())
        return objective

    def _to_retry(self, trial: FrozenTrial) -> bool:
        """Whether it failed before this worker began: such a baseline is scored again."""
        return trial.state == TrialState.FAIL and trial.number < self._began

    def _objective(self, found: dict[str, dict[str, TaskScore]], by_name: dict[str, FrozenTrial]) -> Objective:
        if self.config.objective.scale == "raw":
            return objectives.raw(self.config.tasks)
        models = {name: scores for name, scores in found.items() if name != BASE}
        if BASE not in found or not models:
            failed = BASE if BASE not in found else next(iter(self.config.models))
            reason = by_name[failed].user_attrs.get("error", "unknown")
            raise SearchFailed(f"{failed} could not be scored, so objective.scale parents has no scale: {reason}")
        return objectives.parents(self.config.tasks, found[BASE], models)

    def _record(self, number: int) -> Record:
        trial = self.study.get_trials(deepcopy=False)[number]
        return to_record(trial, objective_of(self.study))


def machine(device: str) -> dict[str, str]:
    """The device and the versions that a score was measured with."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {"device": device, "python": platform.python_version(), **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


__all__ = ["Search", "SearchFailed", "machine"]
