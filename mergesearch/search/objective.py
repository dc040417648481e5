"""The objective: task scores become the one number that the study maximises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergesearch.config import Config, TaskConfig
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import BASE
from mergesearch.search import guards
from mergesearch.search.guards import Guard

Scores = Mapping[str, TaskScore]

# What is no count of right documents already differs between any two candidates: nothing is left to break.
SMOOTH = {"length", "gold_prob", "gold_logprob", "bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity"}

# a model has a skill where it is ahead of the base by more than so many standard errors
_BEYOND_NOISE = 2.0


@dataclass(frozen=True)
class Scale:
    """Where one task's scale begins and how long its unit is: 0 and 1 for the raw metric."""

    origin: float = 0.0
    unit: float = 1.0

    def apply(self, value: float) -> float:
        return (value - self.origin) / self.unit


@dataclass(frozen=True)
class Objective:
    """The weighted mean of the scaled task scores, mixed with the worst of them where that is asked for.

    Metrics where lower is better are negated first.

    Attributes:
        weights: of each task, by label.
        scales: of each task, by label.
        notes: what a reader of the objective should know.
        tie_break: what decides between candidates that lie within a document, `gold_prob`; None for nothing.
        guards: the limits that a winner must keep.
        worst: the share that the lowest scaled score has in the objective; the mean has the rest.
    """

    weights: Mapping[str, float]
    scales: Mapping[str, Scale]
    notes: tuple[str, ...] = ()
    tie_break: str | None = None
    guards: tuple[Guard, ...] = ()
    worst: float = 0.0

    def ranking(self, scores: Scores) -> float:
        """What the study maximises: `value`, and with a tie-break a little more.

        Each task's figure gets half of what one of its n documents is worth, times how probable what is right is
        (`TaskScore.gold`, g in [0, 1]): s_t + g_t / (2 n_t). On one task this is the order by the metric, and by g
        among equals; on several, candidates whose figures differ by less than half a document of each are told apart
        by g. What counts as the candidate's figure, in the table's tasks and on the holdout, stays the metric alone.
        """
        total = sum(self.weights.values())
        breaks = (w * _nudge(scores[t]) / self.scales[t].unit for t, w in self.weights.items())
        return self.value(scores) + (sum(breaks) / total if self.tie_break else 0.0)

    def excess(self, scores: Scores) -> dict[str, float]:
        """For each guard, by task, how far the scores are beyond its limit; 0 or less keeps it."""
        return {guard.task: guard.excess(scores[guard.task]) for guard in self.guards}

    def infeasible(self, scores: Scores) -> str | None:
        """Which guards the scores break, in words; None where they keep all."""
        return "; ".join(filter(None, (guard.why(scores[guard.task]) for guard in self.guards))) or None

    def value(self, scores: Scores) -> float:
        """(1 - worst) sum_t w_t z_t / sum_t w_t + worst min_t z_t, with z_t = (s_t - origin_t) / unit_t."""
        total = sum(self.weights.values())
        mean = sum(w * self.scales[t].apply(signed(scores[t])) for t, w in self.weights.items()) / total
        return (1 - self.worst) * mean + self.worst * min(self.values(scores)) if self.worst else mean

    def shares(self, scores: Scores, every: Mapping[str, Scores]) -> dict[str, float]:
        """How much of each task's skill a candidate has, by label: 0 is the base, 1 the best single model, whatever the
        objective's own scale is. Without the tasks on which no model is better than the base by more than noise.

        Args:
            every: the scores of the base and of every single model, by name; of those that could be scored.
        """
        models = [known for name, known in every.items() if name != BASE]
        if BASE not in every or not models:
            return {}
        found = {}
        for task in self.weights:
            base, best = every[BASE][task], max((known[task] for known in models), key=signed)
            unit = signed(best) - signed(base)
            if unit > _BEYOND_NOISE * math.hypot(base.stderr or 0.0, best.stderr or 0.0):
                found[task] = (signed(scores[task]) - signed(base)) / unit
        return found

    def neglected(self, scores: Scores, every: Mapping[str, Scores]) -> list[tuple[str, float]]:
        """(task, share) of the skills that were given up for others: those with less than half of the mean share, the
        worst first. See `shares`."""
        shares = self.shares(scores, every)
        mean = sum(shares.values()) / max(1, len(shares))
        low = [(task, share) for task, share in shares.items() if mean > 0 and share < mean / 2]
        return sorted(low, key=lambda pair: pair[1])

    def values(self, scores: Scores) -> list[float]:
        """Each task's scaled score, in the order of the tasks: what a study of several objectives maximises."""
        return [self.scales[task].apply(signed(scores[task])) for task in self.weights]

    def factors(self, scores: Scores) -> dict[str, float]:
        """How far the objective moves when a task's metric grows by one: negative where lower is better. With a share
        for the worst task that is so near these scores alone."""
        total = sum(self.weights.values())
        signs = {task: 1.0 if scores[task].higher_is_better else -1.0 for task in self.weights}
        near = self._weights_near(scores)
        return {task: signs[task] * weight / self.scales[task].unit / total for task, weight in near.items()}

    def _weights_near(self, scores: Scores) -> Mapping[str, float]:
        """What each task weighs near these scores; their sum is that of the weights."""
        if not self.worst:
            return self.weights
        near = {task: (1 - self.worst) * weight for task, weight in self.weights.items()}
        lowest = min(self.weights, key=lambda task: self.scales[task].apply(signed(scores[task])))
        near[lowest] += self.worst * sum(self.weights.values())
        return near

    def stderr(self, scores: Scores) -> float | None:
        """Its standard error, the tasks taken as independent and the scales as fixed; None where a task has none."""
        total = sum(self.weights.values())
        parts = []
        for task, weight in self._weights_near(scores).items():
            error = scores[task].stderr
            if error is None:
                return None
            parts.append(weight * error / abs(self.scales[task].unit) / total)
        return math.sqrt(sum(part**2 for part in parts))

    def to_data(self) -> dict[str, Any]:
        scales = {task: [scale.origin, scale.unit] for task, scale in self.scales.items()}
        return {
            "weights": dict(self.weights),
            "scales": scales,
            "notes": list(self.notes),
            "tie_break": self.tie_break,
            "guards": [guard.to_data() for guard in self.guards],
            "worst": self.worst,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Objective:
        scales = {task: Scale(*pair) for task, pair in data["scales"].items()}
        limits = tuple(Guard(**guard) for guard in data.get("guards", ()))
        worst = data.get("worst", 0.0)
        return cls(data["weights"], scales, tuple(data["notes"]), data.get("tie_break"), limits, worst)


def signed(score: TaskScore) -> float:
    """The score turned so that more is better."""
    return score.value if score.higher_is_better else -score.value


def fix(config: Config, scores: Mapping[str, Scores], errors: Mapping[str, str]) -> Objective:
    """The objective of a run, as the scores of the base and of every model alone fix it.

    Args:
        scores: of the parents that could be scored, by name.
        errors: why the others could not.

    Raises:
        LookupError: the scale, or a guard, needs one that could not be scored.
    """
    models = {name: of for name, of in scores.items() if name != BASE}
    if config.objective.scale == "raw":
        objective = raw(config.tasks)
    elif BASE in scores and models:
        objective = parents(config.tasks, scores[BASE], models)
    else:
        failed = BASE if BASE not in scores else next(iter(config.models))
        reason = errors.get(failed, "unknown")
        raise LookupError(f"{failed} could not be scored, so objective.scale parents has no scale: {reason}")
    return with_conditions(objective, config, scores)


def with_conditions(objective: Objective, config: Config, scores: Mapping[str, Scores]) -> Objective:
    """The objective with the tie-break and the guards of a configuration.

    Args:
        scores: the scores of the parents that could be scored, by name.

    Raises:
        LookupError: whom a guard is against could not be scored.
    """
    objective = replace(objective, worst=config.objective.worst)
    limits = guards.fix(config.guard, scores.get(BASE), {name: s for name, s in scores.items() if name != BASE})
    if not scores:
        return objective
    some = next(iter(scores.values()))
    notes = tuple(guard.words(some[guard.task].metric) for guard in limits)
    objective = replace(objective, guards=limits, notes=(*objective.notes, *notes))
    return broken_by(config.objective.tie_break, objective, some)


def _nudge(score: TaskScore) -> float:
    if score.gold is None or score.metric in SMOOTH:
        return 0.0
    return score.gold / (2 * score.documents)


def broken_by(tie_break: str | None, objective: Objective, scores: Scores) -> Objective:
    """The objective with its tie-break, and a note on tasks that have none.

    Args:
        tie_break: `gold_prob`, or None.
        scores: of any candidate.
    """
    if tie_break is None:
        return objective
    without = [f"{task} ({scores[task].metric})" for task in objective.weights
               if scores[task].gold is None and scores[task].metric not in SMOOTH]  # fmt: skip
    note = f"{tie_break} breaks ties: it adds at most half of what one document of a task is worth"
    if without:
        texts = "their answers do" if len(without) > 1 else "its answers do"
        note += f"; not on {', '.join(without)}, as {texts} not hold the probability of what is right"
    return replace(objective, tie_break=tie_break, notes=(*objective.notes, note))


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
