"""Random search: the yardstick that every other strategy has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from mergesearch.config import Config, SearchConfig
from mergesearch.registry import register
from mergesearch.search.budget import Budget
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.samplers import Choice
from mergesearch.search.strategies.base import Cost, Proposal, Sampled, Strategy, Wait
from mergesearch.search.trials import Trial


@register
class Random(Strategy):
    """Uniformly random proposals, until the budget ends."""

    name = "random"
    open_ended = True

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} random proposal{'s' * (count > 1)}" if count else "a random proposal"

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        return Sampled(self.run.space, Choice("random"))

    def again(self, trial: Trial, history: History) -> Sampled:
        return Sampled(self.run.space, Choice("random"))


@register
class RandomControl(Random):
    """At the end as many random proposals as all other strategies made, on top of the budget."""

    name = "random_control"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "random_control": (
            bool,
            Field(
                default=False,
                description="at the end as many random proposals as there were others, on top of the budget",
            ),
        )
    }
    named = False
    order = 1
    open_ended = False
    counts = False
    budgeted = False

    @classmethod
    def joins(cls, search: SearchConfig) -> bool:
        return search.key("random_control", bool)

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        return Cost(trials=config.search.trials)

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        return [Ahead(max(0, outlook.proposals - sum(1 for trial in outlook.of(cls.name) if trial.same_as is None)))]

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        return None if history.new_of(self.name) >= history.proposals else super().next(history, budget)
