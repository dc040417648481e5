"""Learned soups: loss by loss, from few coefficients to many, each starting from the best mix so far.

Two losses find different soups: an expected loss may give up a task of which hardly anything is right, cross-entropy
does not. So a soup does not start from one that was learned with another loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search.budget import Budget, Wanted, still_wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.soup.affine import affine_of
from mergesearch.search.soup.settings import SoupSettings
from mergesearch.search.strategies.base import WAIT, Cost, Learned, Proposal, Strategy, Surroundings, Wait
from mergesearch.search.trials import Trial
from mergesearch.search.work import Work
from mergesearch.space.groups import check_components

# a model takes part in a mix with at least this weight somewhere, or with half its equal share where they are many
LEAST_WEIGHT = 0.05


@register
class LearnedSoups(Strategy):
    """Mixing weights learned on the search documents, for the whole model, per group or per tensor.

    They start from the best mix so far that has every model in it. Part of the documents is held apart, and the latest
    weights that are not worse on it beyond noise are kept. `optimizer: cmaes` searches the same weights without
    gradients, and so does a run whose tasks do not say what is right.
    """

    name = "learned_soup"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "learned_soup": (SoupSettings, Field(default_factory=SoupSettings, description="settings of learned soups"))
    }
    auto: ClassVar[int | None] = 3

    def __init__(self, run: Surroundings):
        super().__init__(run)
        self.settings: SoupSettings = settings_of(run.config)

    @classmethod
    def refuse(cls, config: Config) -> None:
        check_components(settings_of(config).components, "search.learned_soup")

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        settings = settings_of(config)
        each = [settings.cost(loss, len(config.models), documents) for _, loss in settings.soups]
        by = " by gradient" * (settings.optimizer == "adam")
        soups = f"{len(each)} soup{'s' * (len(each) > 1)}{by}"
        return Cost(documents=sum(each), words=f"at most {sum(each):,} to learn {soups}")

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        missing = _missing(settings_of(outlook.config), outlook.of(cls.name))
        keys: list[dict[str, Any]] = [{"per": per, "loss": loss} for per, loss in missing]
        return [Ahead(1, cls.learning(outlook.config, outlook.documents, key)) for key in keys]

    @classmethod
    def learning(cls, config: Config, documents: Sequence[int], key: Mapping[str, Any]) -> int:
        loss = key["loss"] if key.get("gradients", True) else None
        settings = settings_of(config)
        # scores tell the scale of most expected losses; the others' is measured for the first of the soups
        measured = loss == "cross_entropy" and key["per"] == settings.per[0]
        return settings.usual_cost(loss, 1 + len(config.models) if measured else 0, documents)

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        missing = _missing(self.settings, history.of(self.name))
        if not missing or self.run.learner is None:
            return None
        if any(not trial.state.settled and "gradients" not in trial.key for trial in history.of(self.name)):
            return WAIT  # another worker is about to say whether there is a second loss to learn by
        per, loss = missing[0]
        return self._learned({"per": per, "loss": loss, "start": self._start(history, loss)}, history)

    def wants(self, history: History) -> Wanted:
        """The soups still to be learned and those being learned, at what they cost at most."""
        if self.run.learner is None:
            return Wanted()
        missing = _missing(self.settings, history.of(self.name))
        learning = [trial for trial in history.of(self.name) if not trial.state.ended]
        if not missing and not learning:
            return Wanted()
        rest = [still_wanted(trial, self._cost(trial.key.get("loss"), history), history) for trial in learning]
        return Wanted(len(missing), sum(rest) + sum(self._cost(loss, history) for _, loss in missing))

    def again(self, trial: Trial, history: History) -> Learned:
        return self._learned(trial.key, history)

    @classmethod
    def label(cls, trial: Trial) -> str:
        by = (
            " by cross-entropy" if trial.key.get("loss") == "cross_entropy" and trial.key.get("gradients", True) else ""
        )
        return f"learned soup per {trial.key['per']}{by}"

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
            return learner.learn(key["per"], key["loss"], start, work)

        return Learned(find, key)

    def _cost(self, loss: str | None, history: History) -> int:
        by_gradient = self.run.learner is not None and self.run.learner.gradients
        return self.settings.cost(loss if by_gradient else None, len(self.config.models), searched(history))

    def _start(self, history: History, loss: str | None) -> int | None:
        """The trial to start from: the best mix in which every model takes part; None for the configured weight.

        Where a model is left out the loss may be flat in its weight, and gradients do not bring it back.
        """
        if self.settings.start is not None:
            return None
        least = min(LEAST_WEIGHT, 0.5 / len(self.config.models))
        for trial in history.complete():
            if trial.strategy == self.name and trial.key["loss"] != loss:
                continue
            affine = affine_of(trial.recipe, tuple(self.config.models))
            if affine is not None and abs(affine.values).max(axis=0).min() > least:
                return trial.number
        return None


def _missing(settings: SoupSettings, mine: Sequence[Trial]) -> list[tuple[str, str | None]]:
    """The soups still to be learned; a second loss changes nothing where the first could not be used."""
    keys = [trial.key for trial in mine]
    there = {(key["per"], key["loss"]) for key in keys}
    without = {key["per"] for key in keys if not key.get("gradients", True)}
    return [(per, loss) for per, loss in settings.soups if (per, loss) not in there and per not in without]


def settings_of(config: Config) -> SoupSettings:
    """The settings of the learned soups of a run."""
    return config.search.key("learned_soup", SoupSettings)


def searched(history: History) -> list[int]:
    """The search documents of each task of the objective; none before anything was scored."""
    counts = history.documents_of_tasks
    return [counts.get(task.task, 0) for task in history.config.tasks]
