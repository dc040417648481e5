"""The objective: task scores become the one number that the study maximises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.config import TaskConfig
from mergesearch.record import TaskScore

Scores = Mapping[str, TaskScore]


@dataclass(frozen=True)
class Scale:
    """Where one task's scale begins and how long its unit is: 0 and 1 for the raw metric."""

    origin: float = 0.0
    unit: float = 1.0

    def apply(self, value: float) -> float:
        return (value - self.origin) / self.unit


@dataclass(frozen=True)
class Objective:
    """The weighted mean of the scaled task scores; lower-is-better metrics are negated first.

    Attributes:
        weights: of each task, by label.
        scales: of each task, by label.
        notes: what a reader of the objective should know.
    """

    weights: Mapping[str, float]
    scales: Mapping[str, Scale]
    notes: tuple[str, ...] = ()

    def value(self, scores: Scores) -> float:
        """sum_t w_t (s_t - origin_t) / unit_t  /  sum_t w_t."""
        total = sum(self.weights.values())
        return sum(w * self.scales[t].apply(signed(scores[t])) for t, w in self.weights.items()) / total

    def values(self, scores: Scores) -> list[float]:
        """Each task's scaled score, in the order of the tasks: what a study of several objectives maximises."""
        return [self.scales[task].apply(signed(scores[task])) for task in self.weights]

    def factors(self, scores: Scores) -> dict[str, float]:
        """How far the objective moves when a task's metric grows by one: negative where lower is better."""
        total = sum(self.weights.values())
        signs = {task: 1.0 if scores[task].higher_is_better else -1.0 for task in self.weights}
        return {task: signs[task] * weight / self.scales[task].unit / total for task, weight in self.weights.items()}

    def stderr(self, scores: Scores) -> float | None:
        """Its standard error, the tasks taken as independent and the scales as fixed; None where a task has none."""
        total = sum(self.weights.values())
        parts = []
        for task, weight in self.weights.items():
            error = scores[task].stderr
            if error is None:
                return None
            parts.append(weight * error / abs(self.scales[task].unit) / total)
        return math.sqrt(sum(part**2 for part in parts))

    def to_data(self) -> dict[str, Any]:
        scales = {task: [scale.origin, scale.unit] for task, scale in self.scales.items()}
        return {"weights": dict(self.weights), "scales": scales, "notes": list(self.notes)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Objective:
        scales = {task: Scale(*pair) for task, pair in data["scales"].items()}
        return cls(data["weights"], scales, tuple(data["notes"]))


def signed(score: TaskScore) -> float:
    """The score turned so that more is better."""
    return score.value if score.higher_is_better else -score.value


def raw(tasks: Sequence[TaskConfig]) -> Objective:
    """The weighted mean of the metrics."""
    return Objective({task.task: task.weight for task in tasks}, {task.task: Scale() for task in tasks})


def parents(tasks: Sequence[TaskConfig], base: Scores, models: Mapping[str, Scores]) -> Objective:
    """Each task on the scale where the base is 0 and the best single model 1, then the weighted mean.

    A task whose best single model is not better than the base has no such scale: it keeps its raw metric, and a note
    says so.
    """
    scales: dict[str, Scale] = {}
    notes = []
    for task in (config.task for config in tasks):
        origin = signed(base[task])
        best = max(models, key=lambda name: signed(models[name][task]))
        unit = signed(models[best][task]) - origin
        if unit > 0:
            scales[task] = Scale(origin, unit)
            continue
        scales[task] = Scale()
        notes.append(
            f"{task} keeps its raw metric: its best single model ({best}, {models[best][task].value:.4f}) "
            f"is not better than the base ({base[task].value:.4f})"
        )
    return Objective({task.task: task.weight for task in tasks}, scales, tuple(notes))
