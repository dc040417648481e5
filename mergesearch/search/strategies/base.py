"""What a strategy is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mergesearch.recipe import Recipe
from mergesearch.search.history import History


@dataclass(frozen=True)
class Proposal:
    """What to score next.

    Attributes:
        recipe: the candidate; None where it is still to be found, by a sampler or by learning.
        name: of a baseline.
        attributes: what is noted on the trial.
    """

    recipe: Recipe | None = None
    name: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Wanted(NamedTuple):
    """What a strategy may still need of the budget, which earlier ones without an end leave to it.

    Attributes:
        trials: how many.
        documents: document evaluations beside those that score the trials.
    """

    trials: int = 0
    documents: int = 0


class Wait:
    """Stands for: what comes next depends on trials that other workers are at."""


WAIT = Wait()


class Strategy(Protocol):
    """One way to search.

    Attributes:
        name: as the configuration has it; noted on its trials.
        budgeted: whether it stops when the run's budget is used up.
    """

    name: str
    budgeted: bool

    def next(self, history: History) -> Proposal | Wait | None:
        """What to score next; None once there is nothing more to do."""
        ...

    def wants(self, history: History) -> Wanted:
        """What it may still need of the budget."""
        ...


def wanted(strategies: Sequence[Strategy], history: History) -> Wanted:
    """What all of them together may still need."""
    found = [strategy.wants(history) for strategy in strategies]
    return Wanted(sum(w.trials for w in found), sum(w.documents for w in found))
