"""Random search: the yardstick that every other strategy has to beat."""

from __future__ import annotations

from mergesearch.search.history import CONTROL, History
from mergesearch.search.strategies.base import Proposal, Wanted


class RandomControl:
    """Uniformly random proposals, until the budget ends or, as a control, as many as the others made.

    Args:
        like_others: a control: as many as all other strategies together, on top of the budget.
    """

    def __init__(self, like_others: bool = False):
        self.name = CONTROL if like_others else "random"
        self._like_others = like_others
        self.budgeted = not like_others

    def next(self, history: History) -> Proposal | None:
        if self._like_others and len(history.ended(CONTROL)) >= history.proposals:
            return None
        return Proposal(attributes={"stage": "random"})

    def wants(self, history: History) -> Wanted:
        return Wanted()
