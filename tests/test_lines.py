"""Lines and the memo of what was scored, over scores that are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import DocumentScores
from mergesearch.recipe import Rule
from mergesearch.search.lines import LEAST, Line, LineRace, lines_of
from mergesearch.search.soup.memo import Memo

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
TASKS = {"one": 0.5, "two": 0.5}
SIZE = 200


class World:
    """A document is right where a number of its own lies below the chance that a point has: best at `best` of each
    method, a parabola around it."""

    def __init__(self, best: Mapping[str, float], height: Mapping[str, float], seed: int = 0):
        self.best, self.height = best, height
        generator = np.random.default_rng(seed)
        self.difficulty = {task: generator.random(SIZE) for task in TASKS}
        self.asked: list[tuple[str, float]] = []
        self.broken = False

    def chance(self, method: str, value: float) -> float:
        return self.height[method] - 0.5 * (value - self.best[method]) ** 2

    def score(self, rules: tuple[Rule, ...], documents: Mapping[str, Sequence[int]]) -> dict[str, DocumentScores]:
        (rule,) = rules
        number = "lambda" if rule.method == "ties" else "weight"
        if self.broken or (rule.method == "dare_ties" and "dare_ties" not in self.height):
            raise CandidateError("a NaN")
        self.asked.append((rule.method, rule.parameters[number]))
        chance = self.chance(rule.method, rule.parameters[number])
        return {
            task: DocumentScores(list(ids), (self.difficulty[task][list(ids)] < chance).astype(float), "mean")
            for task, ids in documents.items()
        }

    def race(self, budget: int, known: Mapping[str, tuple[str, float]] | None = None, methods: Sequence[str] = METHODS):
        orders = {task: list(np.random.default_rng(1).permutation(SIZE)) for task in TASKS}
        everything = {task: range(SIZE) for task in TASKS}
        scored = {}
        for name, (method, value) in (known or {}).items():
            line = next(line for line in lines_of(methods, 4) if line.method == method)
            scored[name] = self.score(line.rules(value), everything)
        self.asked.clear()
        return LineRace(lines_of(methods, 4), TASKS, orders, budget, self.score, scored)


def test_the_lines_of_a_space() -> None:
    names = [line.name for line in lines_of(METHODS, 4)]
    assert names == ["task_arithmetic", "ties 0.2", "ties 0.7", "dare_ties 0.5"]
    assert [line.name for line in lines_of(["linear"], 4)] == ["task_arithmetic"]
    assert not lines_of(["slerp", "passthrough"], 2)
    path = lines_of(["linear"], 4)[0]
    assert path.known["average"] == 0.25 and path.rules(0.7)[0].parameters == {"weight": 0.7}
    for line in lines_of(["ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"], 3):
        assert all(line.ends[0] < point < line.ends[1] for point in [*line.points, *line.known.values()])


def test_it_finds_the_top_of_the_best_line() -> None:
    height = {"task_arithmetic": 0.7, "ties": 0.5, "dare_ties": 0.4}
    world = World({"task_arithmetic": 0.72, "ties": 1.5, "dare_ties": 0.8}, height)
    found = world.race(1500).run()
    best = found.points[0]
    assert best.line.name == "task_arithmetic" and abs(best.value - 0.72) < 0.12
    assert found.cost <= 1500 and len(world.asked) > 8
    assert {point.line.name for point in found.points[1:]} <= {"ties 0.2", "ties 0.7", "dare_ties 0.5"}
    # the same again, document by document
    again = World(world.best, height).race(1500).run()
    assert [(p.line.name, p.value) for p in again.points] == [(p.line.name, p.value) for p in found.points]


def test_few_documents_buy_few_points() -> None:
    world = World(
        {"task_arithmetic": 0.8, "ties": 1.5, "dare_ties": 0.8},
        dict.fromkeys(("task_arithmetic", "ties", "dare_ties"), 0.6),
    )
    found = world.race(1).run()
    assert found.cost <= 3 * LEAST * 2 * 3 and {value for _, value in world.asked} <= {0.8, 0.6, 1.8}
    few = world.race(100).run()
    assert few.cost <= 100 + 2 * LEAST


def test_baselines_are_points_that_cost_nothing() -> None:
    world = World(
        {"task_arithmetic": 0.3, "ties": 9.0, "dare_ties": 9.0},
        dict.fromkeys(("task_arithmetic", "ties", "dare_ties"), 0.7),
    )
    race = world.race(600, {"task_arithmetic 0.3": ("task_arithmetic", 0.3), "average": ("task_arithmetic", 0.25)})
    found = race.run()
    assert found.points[0].line.name == "task_arithmetic" and abs(found.points[0].value - 0.3) < 0.1
    assert ("task_arithmetic", 0.3) not in world.asked


def test_points_that_fail_are_left_out() -> None:
    world = World({"task_arithmetic": 0.8, "ties": 1.5}, {"task_arithmetic": 0.6, "ties": 0.3})
    assert world.race(800).run().points[0].line.name == "task_arithmetic"
    world.broken = True
    with pytest.raises(CandidateError, match="no point"):
        world.race(800).run()


def test_what_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    told: list[int] = []
    asked: list[str] = []

    def scores(name: str) -> dict[str, DocumentScores]:
        asked.append(name)
        if name == "bad":
            raise CandidateError("a NaN")
        return {"one": DocumentScores([1, 2], np.array([1.0, 0.0]), "mean", np.array([-0.5, np.nan]))}

    for identity, again in (("a", 0), ("a", 0), ("b", 1)):
        memo = Memo(tmp_path / "m.json", identity, told.append)
        asked.clear()
        found = memo.scored("good", {"one": [1, 2]}, lambda: scores("good"))
        gold = found["one"].gold
        assert found["one"].values.tolist() == [1.0, 0.0] and gold is not None and np.isnan(gold[1])
        for _ in range(2):
            with pytest.raises(CandidateError, match="NaN"):
                memo.scored("bad", {"one": [1, 2, 3]}, lambda: scores("bad"))
        if not told[3:]:
            continue
        assert asked == (["good", "bad"] if again else [])
    assert told == [2, 3, 3] * 3
    (tmp_path / "m.json").write_text("{")
    assert not Memo(tmp_path / "m.json", "a", told.append).kept


def test_a_line_with_one_number() -> None:
    line = Line("x", ("x",), "task_arithmetic", "weight", (0.0, 1.0), (0.5,), {"lambda": 2.0})
    assert line.rules(0.25)[0].parameters == {"weight": 0.25, "lambda": 2.0}
