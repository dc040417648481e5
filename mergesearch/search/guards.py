"""Guards: tasks that a winner may not get worse on, beside what the study maximises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergesearch.config import GuardConfig
from mergesearch.evaluate.scores import TaskScore

# Figures are counts over counts: what misses the limit by less misses it by rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Guard:
    """The limit that a candidate must keep on one task.

    Attributes:
        task: its label.
        against: whose figure the limit is taken from, `base` or a model's name.
        reference: that figure on the search documents, in the metric's unit.
        max_drop: how much worse a candidate may be, at least 0, in the metric's unit.
        higher_is_better: of the metric.
    """

    task: str
    against: str
    reference: float
    max_drop: float
    higher_is_better: bool = True

    @property
    def limit(self) -> float:
        """The worst figure that keeps it."""
        return self.reference - self.max_drop if self.higher_is_better else self.reference + self.max_drop

    def excess(self, score: TaskScore) -> float:
        """How much worse than the limit a figure is: 0 or less keeps it, as Optuna's constraints count."""
        worse = self.limit - score.value if self.higher_is_better else score.value - self.limit
        return 0.0 if abs(worse) < ROUNDING else worse

    def why(self, score: TaskScore) -> str | None:
        """The reason why a figure breaks it; None where it does not."""
        if self.excess(score) <= 0:
            return None
        side = "below" if self.higher_is_better else "above"
        return f"{self.task} {score.metric} {score.value:.4f} is {side} its guard's {self.limit:.4f}"

    def words(self, metric: str) -> str:
        """`guard zoo_names: acc at least 0.4000 (base 0.4200, max_drop 0.02)`."""
        bound = "at least" if self.higher_is_better else "at most"
        return (
            f"guard {self.task}: {metric} {bound} {self.limit:.4f} "
            f"({self.against} {self.reference:.4f}, max_drop {self.max_drop:g})"
        )

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def fix(wanted: Sequence[GuardConfig], base: Mapping[str, TaskScore] | None,
        models: Mapping[str, Mapping[str, TaskScore]]) -> tuple[Guard, ...]:  # fmt: skip
    """The guards' limits, from the parents' scores.

    Args:
        base: its scores by task; None where it could not be scored.
        models: the scores of each single model.

    Raises:
        LookupError: whom a guard is against could not be scored.
    """
    return tuple(_fix(each, base, models) for each in wanted)


def _fix(wanted: GuardConfig, base: Mapping[str, TaskScore] | None, models: Mapping[str, Any]) -> Guard:
    there = models if wanted.against == "best" else {} if base is None else {"base": base}
    if not there:
        who = "no model could" if wanted.against == "best" else "base could not"
        raise LookupError(f"guard {wanted.task} is against {wanted.against}, and {who} be scored")
    scores = {name: of[wanted.task] for name, of in there.items()}
    best = max(scores, key=lambda name: scores[name].value if scores[name].higher_is_better else -scores[name].value)
    return Guard(wanted.task, best, scores[best].value, wanted.max_drop, scores[best].higher_is_better)
