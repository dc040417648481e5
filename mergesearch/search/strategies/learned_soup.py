"""Learned soups: loss by loss, from few coefficients to many, each starting from the best mix so far.

Two losses find different soups: an expected loss may give up a task of which hardly anything is right, cross-entropy
does not. So a soup does not start from one that was learned with another loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from mergesearch import registry
from mergesearch.config import Config
from mergesearch.config.search import AUTO
from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search.budget import Budget, Wanted, still_wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.paying import LEAST, ahead_of
from mergesearch.search.soup.affine import Affine, affine_of
from mergesearch.search.soup.settings import FEWEST_STEPS, SoupSettings
from mergesearch.search.strategies.base import WAIT, Cost, Learned, Proposal, Strategy, Surroundings, Wait
from mergesearch.search.strategies.baselines import Baselines
from mergesearch.search.trials import State, Trial
from mergesearch.search.work import Work
from mergesearch.space.groups import check_components

# a model takes part in a mix with at least this weight somewhere, or with half its equal share where they are many
LEAST_WEIGHT = 0.05
# mixes nearer than this are one start
APART = 0.2
# what a soup is called by its loss
_BY = {"cross_entropy": " by cross-entropy", "mixed": " by the mixed loss", "entropy": " by entropy"}
# the same where a line says it of a loss
_SAID = {"expected": " by the expected loss", **_BY}
# of the run's document evaluations, the share within which soups from a second start are learned
SECONDS_SHARE = 1 / 3
# and that within which the best soup is learned on
ROUNDS_SHARE = 2 / 3


@register
class LearnedSoups(Strategy):
    """Mixing weights learned on the search documents, for the whole model, per group or per tensor.

    They start from the best mix so far that has every model in it and was scored on all documents, whatever found it
    but a soup by another loss; where another one, which is not much the same, is within noise of it, and a third of the
    run's document evaluations lasts for it, from both. A part of the documents is not learned from, and says how far to
    go. The best is learned on from where it ended, `rounds` times at most, until that brought less than noise, within
    two thirds of the run's document evaluations. Where these last for the soups of all losses and a round, the losses
    that cost least come first; else they come as listed, and the best of the first is learned on before the next loss.
    `loss: entropy` needs no answers (AdaMerging, Yang et al. 2023, arXiv:2310.02575): the soup grows sure of what it
    says, right or wrong, so what it is worth is told by the tasks' scores alone, and where documents tell their answers
    the other losses know more. `optimizer: cmaes` searches the same weights without gradients, and so does a run whose
    tasks do not say what is right. As a part of `auto` the soups of a loss end where the first of them brought less
    than noise over its start.
    """

    name = "learned_soup"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "learned_soup": (SoupSettings, Field(default_factory=SoupSettings, description="settings of learned soups"))
    }
    auto: ClassVar[int | None] = 2

    def __init__(self, run: Surroundings):
        super().__init__(run)
        self.settings: SoupSettings = settings_of(run.config)

    @classmethod
    def refuse(cls, config: Config) -> None:
        check_components(settings_of(config).components, "search.learned_soup")

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        settings = settings_of(config)
        costs = {loss: settings.cost(loss, len(config.models), documents) for _, loss in settings.soups}
        whole = _whole(config, documents)
        most = 0
        # loss by loss, which is the most: a loss's first soups are learned whatever the rounds before them took
        for loss, each in costs.items():
            most += each * sum(by == loss for _, by in settings.soups)
            most = min(most + settings.rounds_at_most * each, max(most, round(whole * ROUNDS_SHARE)))
        if settings.start is None:  # from a second start as many again, as far as the share for them lasts
            again = sum(costs[loss] for _, loss in settings.soups)
            most = min(most + again, max(most, round(whole * SECONDS_SHARE)))
        count, how = len(settings.soups), " by gradient" * (settings.optimizer == "adam")
        return Cost(documents=most, words=f"at most {most:,} to learn {count} soup{'s' * (count > 1)}{how}")

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        given_up = {} if outlook.history is None else _given_up(outlook.history)
        settings = settings_of(outlook.config)
        mine = outlook.of(cls.name)
        keys: list[dict[str, Any]] = [{"per": per, "loss": loss} for per, loss in _missing(settings, mine, given_up)]
        keys += cls._rounds_ahead(outlook, given_up)
        if outlook.history is not None:
            budget = Budget(outlook.history)
            keys = [key for key in keys if _lasts(settings, key["loss"], budget)]
        return [Ahead(1, cls.learning(outlook.config, outlook.documents, key)) for key in keys]

    @classmethod
    def _rounds_ahead(cls, outlook: Outlook, given_up: Collection[str | None]) -> list[dict[str, Any]]:
        """One round is taken to pay, in each turn that has had none and whose soups leave enough of the share for
        rounds; none where the best of them did not pay."""
        config, documents, mine = outlook.config, outlook.documents, outlook.of(cls.name)
        settings = settings_of(config)
        if not settings.rounds_at_most or any(not trial.key.get("gradients", True) for trial in mine):
            return []
        most = {loss: settings.cost(loss, len(config.models), documents) for _, loss in settings.soups}
        whole = 0 if outlook.history is None else Budget(outlook.history).whole
        whole = whole or _whole(config, documents)
        spent, rounds = sum(trial.learning_documents for trial in mine), []
        for losses in _turns(settings, most, whole):
            missing = [(per, loss) for per, loss in _missing(settings, mine, given_up) if loss in losses]
            spent += sum(cls.learning(config, documents, {"per": per, "loss": loss}) for per, loss in missing)
            learned = [trial for trial in mine if trial.key["loss"] in losses]
            over = not missing and (outlook.history is None or _is_through(learned, outlook.history))
            paying = [loss for loss in losses if loss not in given_up]
            if over or not paying or spent + most[paying[0]] > whole * ROUNDS_SHARE:
                continue
            key = {"per": settings.per[-1], "loss": paying[0]}
            spent += cls.learning(config, documents, key)
            rounds.append(key)
        return rounds

    @classmethod
    def learning(cls, config: Config, documents: Sequence[int], key: Mapping[str, Any]) -> int:
        loss = key["loss"] if key.get("gradients", True) else None
        settings = settings_of(config)
        measured = _is_measured(loss) and key["per"] == settings.per[0]  # for the first of its soups
        return settings.usual_cost(loss, 1 + len(config.models) if measured else 0, documents)

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        if self.run.learner is None:
            return None
        missing = _missing(self.settings, history.of(self.name), _given_up(history))
        waits = False
        most = {loss: self._cost(loss, history) for _, loss in self.settings.soups}
        for losses in _turns(self.settings, most, budget.whole):
            for loss in losses:
                per = next((per for per, by in missing if by == loss), None)
                if per is not None and _lasts(self.settings, loss, budget):
                    return self._first(per, loss, history, budget)
            found = self._round(losses, history, budget)
            if isinstance(found, Learned):
                return found
            waits = waits or found is WAIT  # meanwhile another worker may learn by the next loss
        return self._second(history, budget) or (WAIT if waits else None)

    def _first(self, per: str, loss: str | None, history: History, budget: Budget) -> Learned | Wait:
        """A soup that starts from what others found."""
        if any(not trial.state.settled and "gradients" not in trial.key for trial in history.of(self.name)):
            return WAIT  # another worker is about to say whether there is a second loss to learn by
        start, rival = self._starts(history, loss)
        key: dict[str, Any] = {"per": per, "loss": loss, "start": start}
        if rival is not None:
            key["rival"] = rival
        return self._of_so_many_steps(key, history, budget)

    def _second(self, history: History, budget: Budget) -> Proposal | None:
        """A soup from another start that was within noise of the first one's, where the budget lasts for it."""
        names = self.config.search.strategies
        # in `auto` what comes after is left out where a soup brought something
        after = [registry.get(later, "search") for later in names[names.index(self.name) + 1 :]]
        if AUTO not in self.config.search.strategy and any(s.budgeted and not s.open_ended for s in after):
            return None  # what was left to those that come after would not last for it
        mine, given_up = history.of(self.name), _given_up(history)
        seconds = {(trial.key["per"], trial.key["loss"]) for trial in mine if trial.key.get("second")}
        spent = sum(trial.learning_documents for trial in mine)
        for trial in mine:
            per, loss = trial.key["per"], trial.key["loss"]
            if "rival" not in trial.key or (per, loss) in seconds or loss in given_up:
                continue
            enough = spent + self._cost(loss, history) <= budget.whole * SECONDS_SHARE
            if enough and _lasts(self.settings, loss, budget):
                key = {"per": per, "loss": loss, "start": trial.key["rival"], "second": True}
                return self._of_so_many_steps(key, history, budget)
        return None

    def _round(self, losses: Sequence[str | None], history: History, budget: Budget) -> Learned | Wait | None:
        """The best soup by some losses learned on from where it ended, while that brings more than noise and the
        budget lasts."""
        mine = [trial for trial in history.of(self.name) if trial.key["loss"] in losses]
        if any(not trial.state.ended and trial.key.get("gradients", True) for trial in mine):
            return WAIT  # what comes next goes by what they bring
        best = _best(mine, history)
        if best is None or not _pays(best, history):
            return None
        loss = best.key["loss"]
        # another loss may have had rounds before this one had a soup
        rounds = [trial for trial in mine if "round" in trial.key and trial.key["loss"] == loss]
        if len(rounds) >= self.settings.rounds_at_most or (rounds and best is not rounds[-1]):
            return None
        spent = sum(trial.learning_documents for trial in history.of(self.name))
        if spent + self._cost(loss, history) > budget.whole * ROUNDS_SHARE or not _lasts(self.settings, loss, budget):
            return None
        key = {"per": best.key["per"], "loss": loss, "start": best.number, "round": len(rounds) + 2}
        return self._of_so_many_steps(key, history, budget)

    def wants(self, history: History) -> Wanted:
        """The soups still to be learned and those being learned, at what they cost at most."""
        if self.run.learner is None:
            return Wanted()
        missing = _missing(self.settings, history.of(self.name), _given_up(history))
        learning = [trial for trial in history.of(self.name) if not trial.state.ended]
        if not missing and not learning:
            return Wanted()
        rest = [still_wanted(trial, self._cost(trial.key.get("loss"), history), history) for trial in learning]
        return Wanted(len(missing), sum(rest) + sum(self._cost(loss, history) for _, loss in missing))

    def again(self, trial: Trial, history: History) -> Learned:
        return self._learned(trial.key, history)

    @classmethod
    def by_answers(cls, trial: Trial) -> bool:
        return bool(trial.key.get("gradients", True)) and trial.key.get("loss") != "entropy"

    @classmethod
    def label(cls, trial: Trial) -> str:
        by = _BY.get(trial.key.get("loss") or "", "") if trial.key.get("gradients", True) else ""
        again = f", round {trial.key['round']}" if "round" in trial.key else ""
        second = ", second start" if trial.key.get("second") else ""
        return f"learned soup per {trial.key['per']}{by}{again}{second}"

    @classmethod
    def words(cls, history: History) -> list[str]:
        settings = settings_of(history.config)
        missing = _missing(settings, history.of(cls.name))
        texts = []
        for loss, first in _given_up(history).items():
            left = sum(by == loss for _, by in missing)
            ended = f"{left} more left out" if left else "not learned on" if settings.rounds_at_most else ""
            if ended:
                why = f"trial {first.number} brought less over its start than a quarter of its score's standard error"
                if first.state is State.PRUNED:
                    why = f"a race stopped trial {first.number}"
                texts.append(f"learned soup{_SAID.get(loss or '', '')}: {ended}: {why}")
        return texts

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} learned soup{'s' * (count > 1)}" if count else "a learned soup"

    @classmethod
    def method(cls, trial: Trial) -> str:
        return cls.label(trial)

    def _learned(self, key: Mapping[str, Any], history: History) -> Learned:
        def find(work: Work) -> Recipe:
            learner = self.run.learner
            if learner is None:
                raise CandidateError("soups cannot be learned here")
            work.note({"gradients": learner.gradients})
            start = None if key["start"] is None else history.trials[key["start"]].recipe
            return learner.learn(key["per"], key["loss"], start, work, key.get("round", 1), key.get("steps"))

        return Learned(find, key)

    def _cost(self, loss: str | None, history: History) -> int:
        by_gradient = self.run.learner is not None and self.run.learner.gradients
        return self.settings.cost(loss if by_gradient else None, len(self.config.models), searched(history))

    def _of_so_many_steps(self, key: Mapping[str, Any], history: History, budget: Budget) -> Learned:
        """Of as many steps as the budget lasts for, with scoring what is learned: fewer where it ends before all."""
        if self.run.learner is None or not self.run.learner.gradients or math.isinf(budget.left):
            return self._learned(key, history)
        most = _left(self.settings, budget) - history.documents_each
        steps = self.settings.steps_within(most, key["loss"], _to_measure(key["loss"], history), searched(history))
        return self._learned(key if steps == self.settings.steps else {**key, "steps": steps}, history)

    def _starts(self, history: History, loss: str | None) -> tuple[int | None, int | None]:
        """(the trial to start from, another one that may be as good): the best mixes in which every model takes part;
        (None, None) for the configured weight.

        Where a model is left out the loss may be flat in its weight, and gradients do not bring it back.
        """
        if self.settings.start is not None:
            return None, None
        models = tuple(self.config.models)
        least = min(LEAST_WEIGHT, 0.5 / len(models))
        first: tuple[Trial, Affine] | None = None
        for trial in history.complete():
            if trial.strategy == self.name and trial.key["loss"] != loss:
                continue
            affine = affine_of(trial.recipe, models)
            if affine is None or abs(affine.values).max(axis=0).min() <= least:
                continue
            if first is None:
                first = trial, affine
                continue
            gap, noise = ahead_of(trial, first[0], history, self.run.documents)
            if gap < -noise:
                break
            if trial.strategy != self.name and self._apart(affine, first[1]):
                return first[0].number, trial.number
        return (None, None) if first is None else (first[0].number, None)

    def _apart(self, one: Affine, other: Affine) -> bool:
        """Whether two mixes are not much the same: their weights differ by `APART` in the root mean square over the
        tensors and models."""
        weights = [each.weights(self.run.infos, tuple(self.config.models)) for each in (one, other)]
        return float(np.sqrt(np.mean((weights[0] - weights[1]) ** 2))) >= APART


def _whole(config: Config, documents: Sequence[int]) -> int:
    """The document evaluations that a run will come to at most, by its trials and documents."""
    whole = (config.search.trials + Baselines.cost(config, documents).trials) * sum(documents)
    return whole if config.search.documents is None else min(whole, config.search.documents)


def _lasts(settings: SoupSettings, loss: str | None, budget: Budget) -> bool:
    """Whether the budget lasts for the fewest steps of one more soup; the first is learned as far as it lasts."""
    history = budget.history
    fewest = settings.model_copy(update={"steps": min(FEWEST_STEPS, settings.steps)})
    needed = fewest.usual_cost(loss, _to_measure(loss, history), searched(history)) + history.documents_each
    return not history.of(LearnedSoups.name) or _left(settings, budget) >= needed


def _left(settings: SoupSettings, budget: Budget) -> float:
    """The document evaluations that are left once what other workers are at is learned and scored."""
    history = budget.history

    def cost(trial: Trial) -> int:
        if trial.strategy != LearnedSoups.name or not trial.key.get("gradients", True):
            return 0
        mine = settings.model_copy(update={"steps": trial.key.get("steps", settings.steps)})
        return mine.usual_cost(trial.key["loss"], 0, searched(history))

    return budget.left - sum(still_wanted(trial, cost(trial), history) for trial in history.trials)


def _to_measure(loss: str | None, history: History) -> int:
    """How many parents' losses may have to be measured for one more soup: none once there is one by that loss."""
    there = any(trial.key["loss"] == loss for trial in history.of(LearnedSoups.name))
    return 0 if there else len(history.config.models) + 1


def _turns(settings: SoupSettings, most: Mapping[str | None, int], whole: float) -> list[list[str | None]]:
    """The losses whose soups are learned before the best of them is learned on: all together where the share for
    rounds lasts for them and a round, the cheapest first, as all of them come in any case; else one after the other in
    the order of the settings, so that the first is not left half done.

    Args:
        most: the document evaluations that one soup by each loss takes at most.
        whole: those of the run.
    """
    together = sum(most[loss] for _, loss in settings.soups) + max(most.values())
    return [sorted(most, key=_is_measured)] if together <= whole * ROUNDS_SHARE else [[loss] for loss in most]


def _is_measured(loss: str | None) -> bool:
    """Whether a soup by a loss costs the parents' losses too: scores tell the scale of most of the others."""
    return loss == "cross_entropy"


def _given_up(history: History) -> dict[str | None, Trial]:
    """By loss, the first soup that was learned by it, where it is done and brought less than noise over its start, so
    that no more are learned by it in `auto`. Another loss may find what this one does not."""
    if AUTO not in history.config.search.strategy or history.objective is None:
        return {}
    firsts: dict[str | None, Trial] = {}
    for trial in history.of(LearnedSoups.name):
        firsts.setdefault(trial.key["loss"], trial)
    return {
        loss: first
        for loss, first in firsts.items()
        if first.state is State.PRUNED or (first.state is State.COMPLETE and not _pays(first, history))
    }


def _best(mine: Sequence[Trial], history: History) -> Trial | None:
    """The best complete soup that was learned by gradients."""
    learned = [trial for trial in mine if trial.state is State.COMPLETE and trial.key.get("gradients", True)]
    return max(learned, key=lambda trial: (trial.feasible, history.value(trial) or 0.0), default=None)


def _is_through(mine: Sequence[Trial], history: History) -> bool:
    """Whether no first round will come of the soups of some losses, all of which have begun."""
    if any("round" in trial.key for trial in mine):
        return True
    best = _best(mine, history)
    return all(trial.state.ended for trial in mine) and (best is None or not _pays(best, history))


def _pays(soup: Trial, history: History) -> bool:
    """Whether a complete soup is better than its start by more than a quarter of its score's standard error."""
    if history.objective is None or soup.key["start"] is None:
        return True
    gain = (history.value(soup) or 0.0) - (history.value(history.trials[soup.key["start"]]) or 0.0)
    return gain >= LEAST * (history.objective.stderr(soup.scores) or 0.0)


def _missing(
    settings: SoupSettings, mine: Sequence[Trial], given_up: Collection[str | None] = ()
) -> list[tuple[str, str | None]]:
    """The soups still to be learned, but by losses that were given up; a second loss changes nothing where the first
    could not be used."""
    keys = [trial.key for trial in mine]
    there = {(key["per"], key["loss"]) for key in keys if not key.get("second") and "round" not in key}
    without = {key["per"] for key in keys if not key.get("gradients", True)}
    soups = [(per, loss) for per, loss in settings.soups if loss not in given_up]
    return [(per, loss) for per, loss in soups if (per, loss) not in there and per not in without]


def settings_of(config: Config) -> SoupSettings:
    """The settings of the learned soups of a run."""
    return config.search.key("learned_soup", SoupSettings)


def without_gradients(config: Config) -> Config:
    """The configuration with soups learned by CMA-ES, as a run learns them whose tasks do not say what is right."""
    changed = {LearnedSoups.name: settings_of(config).model_copy(update={"optimizer": "cmaes"})}
    return config.model_copy(update={"search": config.search.model_copy(update=changed)})


def searched(history: History) -> list[int]:
    """The search documents of each task of the objective; none before anything was scored."""
    counts = history.documents_of_tasks
    return [counts.get(task.task, 0) for task in history.config.tasks]
