"""Lines through the space of merges: one number of one method over its whole range, raced on few documents.

What a published default is worth hides what its one number is worth. So each method's number is tried from end to end:
all points on a few documents, the better half of them on twice as many, and so on (successive halving: Jamieson and
Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016, arXiv:1502.07943); then the
top of a parabola through the best point and its neighbours, or where there is none a golden section of the longer side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergesearch.errors import CandidateError
from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores
from mergesearch.recipe import AVERAGE, Rule, single_rule

Documents = Mapping[str, DocumentScores]
# of a recipe's rules on some documents of each task
Score = Callable[[tuple[Rule, ...], Mapping[str, Sequence[int]]], Documents]

# a task's fewest documents in the first round
LEAST = 4
# so many points run to the end
KEPT = 3
# so many more points are tried where the best one's line has its top
REFINEMENTS = 2
# where a parabola has no top, this share into the longer side
_GOLDEN = (3 - math.sqrt(5)) / 2
# a parabola's top nearer than this to a point that was scored, as a share of the line, is that point
_NEAR = 0.02


@dataclass(frozen=True)
class Line:
    """One number of one method.

    Attributes:
        name: in tables.
        needs: the methods of `space.methods`, of which one at least allows it.
        method: whose number it is.
        number: the parameter's YAML name.
        ends: its whole range.
        points: where it is tried, the most promising first.
        fixed: the other parameters.
        known: baselines that are points of it.
        shallow: what the number is in the first layer, from where it grows evenly to the point's in the last; None: it
            is the same in all layers.
        layers: of the models, where it grows.
    """

    name: str
    needs: tuple[str, ...]
    method: str
    number: str
    ends: tuple[float, float]
    points: tuple[float, ...]
    fixed: Mapping[str, float] = field(default_factory=dict)
    known: Mapping[str, float] = field(default_factory=dict)
    shallow: float | None = None
    layers: int = 1

    def rules(self, value: float) -> tuple[Rule, ...]:
        """The rules at one point."""
        if self.shallow is None:
            return single_rule(self.method, None, **{**self.fixed, self.number: value})
        steps = np.linspace(self.shallow, value, self.layers).round(6).tolist()
        return tuple(
            Rule(layers=(layer, layer), method=self.method, parameters={**self.fixed, self.number: at})
            for layer, at in enumerate(steps)
        )


def lines_of(methods: Sequence[str], models: int, layers: int = 1) -> list[Line]:
    """The lines that a space's methods allow.

    The first is the way from the base through the plain average, where every model has its equal share of the weight,
    and beyond: task arithmetic with one weight for all models. The second keeps the average's weight in the first layer
    and lets it grow with depth (LiNeS: Wang et al., "LiNeS: post-training layer scaling prevents forgetting and
    enhances model merging", 2024, arXiv:2410.17146).
    """
    elected = {"weight": 1.0}
    known = {AVERAGE: 1 / models, "task_arithmetic 0.3": 0.3, "task_arithmetic 0.4": 0.4}
    every = [
        Line("task_arithmetic", ("task_arithmetic", "linear"), "task_arithmetic", "weight", (0.0, 2.0),
             (0.8, 0.6, 1.0, 1.4), known=known),
        Line("lines", ("task_arithmetic", "linear"), "task_arithmetic", "weight", (0.0, 2.0), (0.9, 1.3),
             known={AVERAGE: 1 / models}, shallow=1 / models, layers=layers),
        Line("ties 0.2", ("ties",), "ties", "lambda", (0.0, 4.0), (1.8, 2.6),
             {**elected, "density": 0.2}, {"ties 0.2": 1.0}),
        Line("ties 0.7", ("ties",), "ties", "lambda", (0.0, 4.0), (1.8, 1.2, 2.6), {**elected, "density": 0.7}),
        Line("dare_ties 0.5", ("dare_ties",), "dare_ties", "weight", (0.0, 2.0), (0.8, 1.1),
             {"density": 0.5}, {"dare_ties 0.5": 0.5}),
        Line("dare_linear 0.8", ("dare_linear",), "dare_linear", "weight", (0.0, 2.0), (0.8, 0.6), {"density": 0.8}),
        Line("della 0.5", ("della",), "della", "lambda", (0.0, 4.0), (1.8, 2.6),
             {**elected, "density": 0.5}, {"della 0.5": 1.0}),
        Line("della_linear 0.8", ("della_linear",), "della_linear", "weight", (0.0, 2.0), (0.8, 0.6),
             {"density": 0.8}),
        Line("breadcrumbs 0.9", ("breadcrumbs",), "breadcrumbs", "weight", (0.0, 2.0), (0.8, 0.6),
             {"density": 0.9}, {"breadcrumbs 0.9": 0.4}),
        Line("breadcrumbs_ties 0.9", ("breadcrumbs_ties",), "breadcrumbs_ties", "weight", (0.0, 2.0), (0.8, 0.6),
             {"density": 0.9}),
    ]  # fmt: skip
    deep = layers >= 2
    return [line for line in every if set(line.needs) & set(methods) and (deep or line.shallow is None)]


@dataclass
class Point:
    """A point of a line, and what it did on the documents so far; None: it could not be built or scored.

    Attributes:
        free: whether its documents were there before, so that they cost nothing.
    """

    line: Line
    value: float
    documents: Documents | None = field(default_factory=dict)
    free: bool = False


@dataclass(frozen=True)
class Found:
    """What a race of lines found.

    Attributes:
        points: the best point of each line, the best first; of the others those alone that are within a standard error
            of it and cost something, so that they stand in no table yet.
        cost: document evaluations.
    """

    points: Sequence[Point]
    cost: int


@dataclass
class LineRace:
    """One race.

    Attributes:
        lines: at least one.
        factors: of each task's figure in the objective; they say which tasks there are.
        orders: each task's documents in the order in which they are taken.
        budget: document evaluations, at most, but for a first round of three points on `LEAST` documents of each task.
        score: of new points.
        known: what baselines did on all documents, by name.
        cost: document evaluations so far.
        seen: how many documents of each task's order were taken so far.
    """

    lines: Sequence[Line]
    factors: Mapping[str, float]
    orders: Mapping[str, Sequence[int]]
    budget: int
    score: Score
    known: Mapping[str, Documents] = field(default_factory=dict)
    cost: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def run(self) -> Found:
        """The race, to its end.

        Raises:
            CandidateError: no point could be scored.
        """
        points, rounds = self._entries()
        old = [
            Point(line, value, self.known[name], free=True)
            for line in self.lines
            for name, value in line.known.items()
            if name in self.known
        ]
        alive, each = points, max(1, self.budget // (rounds + 1))
        for _ in range(rounds):
            self._grow(max(1, each // max(1, len(alive) * len(self.orders))))
            for point in alive:
                self._extend(point)
            alive = [point for point in self._sorted(alive) if point.documents is not None]
            alive = alive[: max(KEPT, math.ceil(len(alive) / 2))]
        everything = [*points, *old]
        there = self._sorted([point for point in [*alive, *old] if point.documents])
        if not there:
            raise CandidateError("no point of the sweep could be built and scored")
        for _ in range(REFINEMENTS):
            value = self._top(there[0], everything)
            if value is None or self.cost + sum(self.seen.values()) > self.budget:
                break
            point = Point(there[0].line, value)
            self._extend(point)
            everything.append(point)
            there = self._sorted([each for each in [*there, point] if each.documents])
        firsts: dict[str, Point] = {}
        for point in there:
            firsts.setdefault(point.line.name, point)
        best, *others = firsts.values()
        close = [point for point in others if not point.free and self._is_close(point, best)]
        return Found([best, *close], self.cost)

    # --- who runs, on what ---

    def _entries(self) -> tuple[list[Point], int]:
        """As many points as there are documents for, and the number of rounds: in turns a point of each line."""
        depth = max(len(line.points) for line in self.lines)
        first = [Point(self.lines[0], value) for value in self.lines[0].points[:2]]
        turns = [(line, line.points[turn]) for turn in range(depth) for line in self.lines if turn < len(line.points)]
        there = {(point.line.name, point.value) for point in first}
        every = [*first, *(Point(line, value) for line, value in turns if (line.name, value) not in there)]
        count = len(every)
        while count > 3 and self.budget < LEAST * len(self.orders) * count * (_rounds(count) + 1):
            count -= 1
        return every[:count], _rounds(count)

    def _grow(self, more: int) -> None:
        """So many more documents of every task, `LEAST` at least in all."""
        for task, order in self.orders.items():
            self.seen[task] = min(len(order), max(LEAST, self.seen.get(task, 0) + more))

    def _extend(self, point: Point) -> None:
        """Scores a point on what it has not been scored on."""
        if point.free or point.documents is None:
            return
        done = {task: set(scores.ids) for task, scores in point.documents.items()}
        missing = {
            task: sorted(n for n in order[: self.seen[task]] if n not in done.get(task, ()))
            for task, order in self.orders.items()
        }
        missing = {task: ids for task, ids in missing.items() if ids}
        if not missing:
            return
        self.cost += sum(map(len, missing.values()))
        try:
            more = self.score(point.line.rules(point.value), missing)
        except CandidateError:
            point.documents = None
            return
        point.documents = {task: _joined(point.documents.get(task), more.get(task)) for task in self.orders}

    # --- who is better ---

    def _sorted(self, points: Sequence[Point]) -> list[Point]:
        """The best first, on the documents so far; what could not be scored last."""
        return sorted(points, key=lambda point: -self.worth(point.documents))

    def worth(self, documents: Documents | None) -> float:
        """The objective, up to what is the same for all candidates, on those of the documents that were seen so far."""
        if not documents:
            return -math.inf
        total = 0.0
        for task, factor in self.factors.items():
            scores = _part_of(documents[task], set(self.orders[task][: self.seen.get(task, 0)]))
            if len(scores.values):
                total += factor * statistics.figure(scores.values, scores.aggregation) + _nudge(scores, factor)
        return total

    def _is_close(self, point: Point, best: Point) -> bool:
        """Whether it is behind the best by less than a standard error of the difference, where both were scored."""
        mine, theirs = point.documents or {}, best.documents or {}
        behind, variance = 0.0, 0.0
        for task, factor in self.factors.items():
            ids = set(mine[task].ids) & set(theirs[task].ids)
            pair = [_part_of(each[task], ids) for each in (mine, theirs)]
            gap = statistics.difference(pair[0].values, pair[1].values, mine[task].aggregation)
            behind += factor * gap.value
            variance += factor**2 * (gap.stderr or 0.0) ** 2
        return behind >= -math.sqrt(variance)

    def _top(self, best: Point, points: Sequence[Point]) -> float | None:
        """Where the best point's line has its top, by its neighbours; None where there is nothing more to look for."""
        line, (low, high) = best.line, best.line.ends
        there = {point.value: point for point in points if point.line is line and point.documents}
        left = max((value for value in there if value < best.value), default=None)
        right = min((value for value in there if value > best.value), default=None)
        for value in (left, right):
            if value is not None:
                self._extend(there[value])  # it may have left the race early
        near = _NEAR * (high - low)
        if left is not None and right is not None:
            at = [left, best.value, right]
            worths = [self.worth(there[value].documents) for value in at]
            a, b, _ = np.polyfit(at, worths, 2) if np.isfinite(worths).all() else (0.0, 0.0, 0.0)
            top = -b / (2 * a) if a < -1e-12 else math.nan
            if left < top < right and min(abs(top - value) for value in there) > near:
                return round(float(top), 3)
        below, above = best.value - (low if left is None else left), (high if right is None else right) - best.value
        value = best.value + _GOLDEN * above if above >= below else best.value - _GOLDEN * below
        return round(value, 3) if min(abs(value - other) for other in there) > near else None


def _rounds(points: int) -> int:
    """Until `KEPT` are left, and one more on which they are compared."""
    return 1 + max(0, math.ceil(math.log2(points / KEPT)))


def _joined(before: DocumentScores | None, more: DocumentScores | None) -> DocumentScores:
    if before is None or more is None:
        found = before or more
        assert found is not None, "a task without any documents"
        return found
    ids = np.array([*before.ids, *more.ids])
    order = np.argsort(ids, kind="stable")
    gold = None if before.gold is None or more.gold is None else np.concatenate([before.gold, more.gold])[order]
    values = np.concatenate([before.values, more.values])[order]
    return DocumentScores(ids[order].tolist(), values, before.aggregation, gold)


def _part_of(scores: DocumentScores, ids: set[int]) -> DocumentScores:
    kept = np.array([number in ids for number in scores.ids], dtype=bool)
    gold = None if scores.gold is None else scores.gold[kept]
    return DocumentScores([n for n in scores.ids if n in ids], scores.values[kept], scores.aggregation, gold)


def _nudge(scores: DocumentScores, factor: float) -> float:
    """Half of what a document is worth, times how probable what is right is: few documents make many ties."""
    if scores.gold is None or scores.aggregation != "mean":
        return 0.0
    known = scores.gold[np.isfinite(scores.gold)]
    return abs(factor) * float(np.exp(known).mean()) / (2 * len(scores.ids)) if len(known) else 0.0
