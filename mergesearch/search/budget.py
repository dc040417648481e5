"""What a run may still spend of `search.trials`, `documents` and `hours`, and what is left to later strategies.

A strategy without an end of its own (the study, random search) would use up what comes after it in the list. So it is
given the budget less what the later ones say they still want. So are those before it that wait for other workers,
while it goes on meanwhile. This is the one place where that is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from mergesearch import registry
from mergesearch.search.history import History
from mergesearch.search.trials import Trial


class Wanted(NamedTuple):
    """What a strategy may still need.

    Attributes:
        trials: how many.
        documents: document evaluations beside those that score the trials.
    """

    trials: int = 0
    documents: int = 0


NOTHING = Wanted()


def total(wanted: Iterable[Wanted]) -> Wanted:
    """What several strategies may need together."""
    each = list(wanted)
    return Wanted(sum(one.trials for one in each), sum(one.documents for one in each))


@dataclass(frozen=True)
class Budget:
    """The budget of a run at one moment.

    Attributes:
        history: what was spent.
        later: what is left to strategies that come later.
        early: whether strategies that come before are not through, and wait for other workers.
    """

    history: History
    later: Wanted = NOTHING
    early: bool = False

    @property
    def used_up(self) -> bool:
        """Whether one of the three budgets is used up, but for what is left to later strategies.

        In hours that is as long as one worker has taken for as many document evaluations, and at most half of the
        budget.
        """
        search, end = self.history.config.search, self.history.hours_to_search or 0.0
        documents = self.kept
        hours = min(documents * self.history.hours_of_a_document, end / 2) if documents else 0.0
        return self.history.proposals >= search.trials - self.later.trials or self._is_over(
            documents, self.history.hours + hours
        )

    @property
    def kept(self) -> int:
        """The document evaluations that are left to later strategies, the scoring of their trials included; no more
        than half of the budget, so that what comes first is not left without any."""
        documents = self.later.documents + self.later.trials * self.history.documents_each
        budget = self.history.config.search.documents
        return documents if budget is None else min(documents, budget // 2)

    @property
    def affordable(self) -> int:
        """How many proposals there may be in all by the time that later strategies begin, should each be scored on
        every document."""
        search, history = self.history.config.search, self.history
        trials = search.trials - self.later.trials
        if search.documents is None or not history.documents_each:
            return trials
        left = search.documents - history.documents - self.kept
        return min(trials, history.proposals + max(0, left) // history.documents_each)

    @property
    def whole(self) -> int:
        """The document evaluations that the whole run will come to, about: its budget, or what its trials, and hours
        with as many workers as there are, amount to; 0 before anything is scored."""
        search, history = self.history.config.search, self.history
        names = registry.uncounted()
        uncounted = sum(trial.documents for trial in history.trials if trial.strategy in names)
        ends = [uncounted + search.trials * history.documents_each]
        if search.documents is not None:
            ends.append(search.documents)
        hours, each = history.hours_to_search, history.hours_of_a_document
        if hours is not None and each:
            ends.append(round(hours * history.workers / each))
        return min(ends)

    @property
    def left(self) -> float:
        """The document evaluations that are left, about, without what later strategies need; infinite without an end in
        documents or hours, or before anything says how long one takes. In hours what one worker may still do: it is
        asked for a soup, which one worker learns."""
        search, history = self.history.config.search, self.history
        ends = [math.inf]
        if search.documents is not None:
            ends.append(search.documents - history.documents - self.kept)
        hours, each = history.hours_to_search, history.hours_of_a_document
        if hours is not None and each:
            ends.append((hours - history.hours) / each - self.kept)
        return max(0.0, min(ends))

    def is_over(self, number: int, now: datetime | None = None) -> bool:
        """Whether documents or hours are used up, by all that was done and by a trial that a worker is at.

        Args:
            number: of that trial.
            now: local time; by default that of this host's clock.
        """
        # without hours nobody asks for them: this is looked at before every step of a soup
        hours = 0.0 if self.history.config.search.hours is None else self.history.hours_with(number, now)
        return self._is_over(0, hours)

    def _is_over(self, documents: int, hours: float) -> bool:
        """Whether so many document evaluations more, or so many hours in all, use a budget up."""
        search, end = self.history.config.search, self.history.hours_to_search
        return (search.documents is not None and self.history.documents + documents >= search.documents) or (
            end is not None and hours >= end
        )


def still_wanted(trial: Trial, cost: int, history: History) -> int:
    """The document evaluations that a trial under way may still take: to be learned at that cost, and scored."""
    if trial.state.settled:
        return 0
    return max(0, cost - trial.learning_documents) + history.documents_each
