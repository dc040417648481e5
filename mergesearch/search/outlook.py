"""What a strategy expects to do still: what the estimate of the time left is made of.

A strategy that has said nothing of it is taken to do what its `cost` adds to the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergesearch.config import Config
from mergesearch.search.history import History
from mergesearch.search.trials import Trial


@dataclass(frozen=True)
class Ahead:
    """Trials that a strategy will probably still begin, all alike.

    Attributes:
        trials: how many; None: as many as the budget allows.
        learning: document evaluations that go into finding the recipe of each.
        races: whether a race may stop them.
        copies: whether they do what an earlier trial did, and are not scored again.
        unless: what would make them needless, in words; empty where nothing is likely to.
    """

    trials: int | None
    learning: int = 0
    races: bool = True
    copies: bool = False
    unless: str = ""


@dataclass(frozen=True)
class Outlook:
    """A run as a strategy looks ahead from.

    Attributes:
        config: the run's configuration.
        documents: how many search documents each task of the objective has.
        history: the run so far; None before it has begun.
        proposals: how many trials that count against `search.trials` there will be when the strategy begins.
    """

    config: Config
    documents: Sequence[int]
    history: History | None = None
    proposals: int = 0

    def of(self, strategy: str) -> list[Trial]:
        """The trials that a strategy has begun."""
        return [] if self.history is None else self.history.of(strategy)
