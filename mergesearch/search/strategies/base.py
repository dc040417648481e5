"""What a strategy is: one way to propose what is scored next.

A strategy is one file. Its class says all that the rest of the house asks: its settings (`keys`), what it costs at
most (`cost`, for `mergesearch check`), what it still wants of the budget (`wants`), how its trials are called
(`label`), whether they may race. It keeps no state of its own: everything is read from the study's trials, so that any
worker goes on where any other stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, cast

import optuna

from mergesearch import registry
from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import Scores
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.registry import Declared
from mergesearch.search.budget import Budget, Wanted
from mergesearch.search.history import History
from mergesearch.search.lines import Documents, Found, Line
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.samplers import Choice
from mergesearch.search.soup.settings import Loss
from mergesearch.search.trials import Kind, Trial
from mergesearch.search.work import Work
from mergesearch.space import Space

# --- proposals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stated:
    """A recipe to score.

    Attributes:
        recipe: the candidate.
        name: of a baseline.
        key: what the strategy notes on the trial, plain data.
    """

    recipe: Recipe
    name: str | None = None
    key: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[Kind] = Kind.STATED


@dataclass(frozen=True)
class Sampled:
    """A point of a space, which a sampler chooses.

    Attributes:
        space: what may be proposed.
        choice: the sampler, with what it needs to know of the space.
        key: what the strategy needs to make the same proposal again, plain data.
    """

    space: Space
    choice: Choice
    key: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[Kind] = Kind.SAMPLED


@dataclass(frozen=True)
class Learned:
    """A recipe that is found on the search documents by the worker that takes the trial.

    Attributes:
        find: finds it.
        key: what the strategy needs to make the same proposal again, plain data.
    """

    find: Callable[[Work], Recipe]
    key: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[Kind] = Kind.LEARNED


Proposal = Stated | Sampled | Learned


class Wait:
    """Stands for: what comes next depends on trials that other workers are at."""


WAIT = Wait()

# --- what a strategy is made with ------------------------------------------------------------------------------------


class Learns(Protocol):
    """Finds recipes on the search documents, above all the coefficients of soups: `soup.learner.Learner`.

    Attributes:
        gradients: whether the tasks allow it to learn by gradients.
    """

    @property
    def gradients(self) -> bool: ...

    def learn(
        self,
        per: str,
        loss: Loss | None,
        start: Recipe | None,
        work: Work,
        times: int = 1,
        steps: int | None = None,
    ) -> Recipe: ...

    def closed_form(self, name: str, solve: Any, work: Work) -> Recipe: ...

    def full_form(self, name: str, kind: Any, measure: Any, work: Work) -> Recipe: ...

    def sweep(self, lines: Sequence[Line], budget: int, known: Mapping[str, Documents], work: Work) -> Found: ...


@dataclass(frozen=True)
class Measures:
    """Statistics of the models on documents, which a recipe names.

    Attributes:
        kind: of what is measured.
        method: the merge method that goes by it.
        how: a function of `soup.full`.
    """

    kind: Literal["inputs", "squares"]
    method: str
    how: Any


@dataclass(frozen=True)
class Surroundings:
    """What the strategies of one worker have in common.

    Attributes:
        config: the run's configuration.
        study: what is noted there of the whole run is read and written with `store.noted` and `store.note`.
        space: all that may be proposed.
        coarse: the same with one group for the whole model, where the space grows.
        infos, layers: of the pool.
        learner: learns soups; None where there is none.
        began: how many trials there were when this worker began.
        documents: what the trial of a number did on each search document; None where that is not known.
    """

    config: Config
    study: optuna.Study
    space: Space
    coarse: Space | None = None
    infos: Sequence[TensorInfo] = ()
    layers: int = 0
    learner: Learns | None = None
    began: int = 0
    documents: Callable[[int], Documents | None] = lambda number: None


@dataclass(frozen=True)
class Cost:
    """What a strategy may cost at most, beside the scoring of the run's `search.trials`.

    Attributes:
        trials: that it adds to them.
        documents: document evaluations that go into finding recipes.
        words: these documents, for `mergesearch check`: `at most 9,000 to learn 2 soups by gradient`.
    """

    trials: int = 0
    documents: int = 0
    words: str = ""


class Strategy(Declared, ABC):
    """One way to search; what it says of itself before a run stands in `registry.Declared`.

    The first line of a strategy's docstring is what `mergesearch strategies` says of it.
    """

    def __init__(self, run: Surroundings):
        self.run = run
        self.config: Config = run.config

    # --- before a run ---

    @classmethod
    def refuse(cls, config: Config) -> None:
        """Looks at what it needs, before anything is loaded.

        Raises:
            UserError: a run with this configuration cannot work.
        """
        return

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        """What it may cost at most.

        Args:
            documents: how many search documents each task of the objective has.
        """
        return Cost()

    # --- how long it will take ---

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        """The trials that it will probably still begin, in order, should the budget last.

        `cost` says what they may come to at most, this what is usual; what is under way is no part of it.
        """
        if cls.open_ended:
            return [Ahead(None)]
        cost, there = cls.cost(outlook.config, outlook.documents), len(outlook.of(cls.name))
        return [Ahead(cost.trials - there, races=True)] if cost.trials > there else []

    @classmethod
    def learning(cls, config: Config, documents: Sequence[int], key: Mapping[str, Any]) -> int:
        """The document evaluations that finding the recipe of a trial with this key usually takes."""
        return 0

    @classmethod
    def measures(cls) -> Measures | None:
        """What it measures of the models on documents before it has a recipe; None: nothing."""
        return None

    # --- during a run ---

    @abstractmethod
    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        """What to score next; None once there is nothing more to do.

        Args:
            history: the run so far.
            budget: what it may spend.
        """

    def wants(self, history: History) -> Wanted:
        """What it may still need of the budget."""
        return Wanted()

    def again(self, trial: Trial, history: History) -> Sampled | Learned:
        """The proposal that a trial of its was made of; for proposals that are no stated recipe."""
        raise NotImplementedError(f"{self.name} proposes stated recipes alone")

    def known_in(self, trial: Trial, history: History) -> Space:
        """The space of which a trial whose recipe no sampler chose gets its parameters, where it is a point of it, so
        that samplers learn from it: the one that the study begins with."""
        return self.run.coarse or self.run.space

    def held(self, trial: Trial) -> Scores | None:
        """The scores of a trial of its that is known already, so that nothing is built or scored; mostly None."""
        return None

    # --- its trials, in tables ---

    @classmethod
    def may_race(cls, trial: Trial) -> bool:
        """Whether a race may stop a trial of its before all documents are scored."""
        return True

    @classmethod
    def by_answers(cls, trial: Trial) -> bool:
        """Whether a trial of its was learned by how probable the right answers of the search documents are; of what
        another run learned so, the key says it."""
        return bool(trial.key.get("by_answers"))

    @classmethod
    def label(cls, trial: Trial) -> str:
        """What kind of trial it is, in words."""
        return cls.name.replace("_", " ")

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        """So many of its trials, for an estimate: `3 learned soups`; without a number what is under way of it."""
        name = cls.name.replace("_", " ")
        return f"{count} by {name}" if count else name

    @classmethod
    def method(cls, trial: Trial) -> str:
        """What the table's column `method` says of a trial of its: the methods of the recipe's rules."""
        rules: Sequence[Mapping[str, Any]] = (trial.recipe_data or {}).get("rules", ())
        return "+".join(dict.fromkeys(rule["method"] for rule in rules))

    @classmethod
    def words(cls, history: History) -> list[str]:
        """What there is to say beside the table of a run that it was part of."""
        return []


def learned_by_answers(trial: Trial) -> bool:
    """`Strategy.by_answers` of a trial of another run, whose strategy need not be there any more."""
    known = cast("type[Strategy] | None", registry.strategies().get(trial.strategy))
    return known is not None and known.by_answers(trial)


def gone(strategy: str) -> type[Strategy]:
    """What stands for a strategy whose file is not there any more: its trials keep the words that all have in common,
    and one that was not finished fails."""

    class Gone(Strategy):
        name = strategy

        def next(self, history: History, budget: Budget) -> None:
            return None

        def again(self, trial: Trial, history: History) -> Sampled | Learned:
            raise CandidateError(f"strategy {strategy} is not there any more, so this trial cannot be gone on with")

    return Gone
