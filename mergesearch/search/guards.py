"""Guards: tasks that a winner may not get worse on, beside what the study maximises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mergesearch.config import LENGTH, GuardConfig
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore

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
        length: whether it is about the tokens of the task's answers, beside the task's own metric.
    """

    task: str
    against: str
    reference: float
    max_drop: float
    higher_is_better: bool = True
    length: bool = False

    @property
    def name(self) -> str:
        """The task, or `gsm8k, length`: what a report calls it beside the task itself."""
        return f"{self.task}, {LENGTH}" if self.length else self.task

    def figure(self, score: TaskScore) -> TaskScore:
        """What of a task's score it is about."""
        return _length(score) if self.length else score

    @property
    def limit(self) -> float:
        """The worst figure that keeps it."""
        return self.reference - self.max_drop if self.higher_is_better else self.reference + self.max_drop

    def excess(self, score: TaskScore) -> float:
        """How much worse than the limit a figure is: 0 or less keeps it, as Optuna's constraints count."""
        value = self.figure(score).value
        worse = self.limit - value if self.higher_is_better else value - self.limit
        return 0.0 if abs(worse) < ROUNDING else worse

    def why(self, score: TaskScore) -> str | None:
        """The reason why a figure breaks it; None where it does not."""
        if self.excess(score) <= 0:
            return None
        side, figure = "below" if self.higher_is_better else "above", self.figure(score)
        return f"{self.task} {figure.metric} {figure.value:.4f} is {side} its guard's {self.limit:.4f}"

    def words(self, metric: str) -> str:
        """`guard zoo_names: acc at least 0.4000 (base 0.4200, max_drop 0.02)`."""
        bound = "at least" if self.higher_is_better else "at most"
        return (
            f"guard {self.task}: {LENGTH if self.length else metric} {bound} {self.limit:.4f} "
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
    length = wanted.metric == LENGTH and all(score.metric != LENGTH for score in scores.values())
    scores = {name: _length(score) for name, score in scores.items()} if length else scores
    best = max(scores, key=lambda name: scores[name].value if scores[name].higher_is_better else -scores[name].value)
    return Guard(wanted.task, best, scores[best].value, wanted.max_drop, scores[best].higher_is_better, length)


def with_lengths(guards: Sequence[Guard], scores: Scores) -> Scores:
    """Scores with a task more for each guard on the length of a task's answers, for who compares by tasks."""
    own = {guard.name: guard for guard in guards if guard.length}
    return replace(
        scores,
        tasks={**scores.tasks, **{name: guard.figure(scores.tasks[guard.task]) for name, guard in own.items()}},
        documents={**scores.documents, **{name: _lengths(scores.documents[g.task]) for name, g in own.items()}},
    )


def _length(score: TaskScore) -> TaskScore:
    # what is not known keeps no limit
    value = math.inf if score.length is None else score.length
    return replace(score, value=value, stderr=None, metric=LENGTH, higher_is_better=False)


def _lengths(documents: DocumentScores) -> DocumentScores:
    length = np.full(len(documents.ids), np.nan) if documents.length is None else documents.length
    known = np.isfinite(length)
    ids = [number for number, there in zip(documents.ids, known, strict=True) if there]
    return DocumentScores(ids, length[known], "mean")
