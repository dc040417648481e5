"""scripts/bench/search.py in small: the same again, resumable, and honest about what it costs."""

from __future__ import annotations

import csv
import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesearch.errors import CandidateError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, Rule
from mergesearch.search.trials import State, Trial
from scripts.bench import search, search_report, yardstick

pytest.importorskip("cma", reason="pip install cma")

DOCUMENTS = 10
STRATEGIES = ("cmaes", "random", "tpe")


class Layers:
    """A group of layers, as the search space has them."""

    def __init__(self, first: int, last: int):
        self.layers = (first, last)

    def rule(self, method, models, parameters) -> Rule:
        return Rule(layers=self.layers, method=method, models=tuple(models), parameters=dict(parameters))


def space(method: str = "ties"):
    models = {"a": "A", "b": "B"}
    groups = [Layers(0, 1), Layers(2, 3)]
    return yardstick.YardSpace(
        tuple(models), groups, lambda rules: Recipe(base="base", models=models, rules=tuple(rules)), method
    )


class Judge:
    """Scores a recipe by how far its weights are from 0.7; counts what it is asked. Some candidates may fail."""

    def __init__(self, broken=lambda recipe: False, stop_at: int | None = None):
        self.searched, self.held = [], []
        self.broken, self.stop_at = broken, stop_at

    def search(self, recipe: Recipe) -> tuple[float, int]:
        if self.stop_at is not None and len(self.searched) == self.stop_at:
            raise KeyboardInterrupt
        self.searched.append(recipe.id)
        if self.broken(recipe):
            raise CandidateError("it overflows")
        weights = [w for rule in recipe.rules for w in rule.parameters["weight"].values()]
        return -sum((w - 0.7) ** 2 for w in weights), DOCUMENTS

    def holdout(self, recipe: Recipe) -> float:
        self.held.append(recipe.id)
        return -1.0

    def measures(self):
        return yardstick.Measures(self.search, self.holdout, DOCUMENTS)


def play(path: Path, strategy: str = "cmaes", seed: int = 0, count: int = 20, judge=None, **options):
    judge = judge or Judge()
    ledger = yardstick.Ledger(path, judge.measures(), **options)
    yardstick.STRATEGIES[strategy](space(), seed, count, ledger)
    return yardstick.read_candidates(path)


def without_time(found) -> list:
    return [(c.id, c.value, c.documents, c.holdout, c.error) for c in found]


# --- the space ---


def test_the_start_is_an_equal_mix_at_full_density():
    found = space()
    recipe = found.decode(found.start)
    assert found.dimension == 8
    for rule in recipe.rules:
        assert rule.parameters == {"weight": {"a": 0.5, "b": 0.5}, "density": {"a": 1.0, "b": 1.0}, "normalize": False}


def test_vectors_span_the_ranges_and_are_kept_inside():
    found = space()
    low, high = (found.decode(np.full(8, value)).rules[0].parameters for value in (-3.0, 2.0))
    assert (low["weight"]["a"], low["density"]["a"]) == (0.0, pytest.approx(0.1))
    assert (high["weight"]["a"], high["density"]["a"]) == (1.0, 1.0)


def test_task_arithmetic_has_no_densities():
    found = space("task_arithmetic")
    assert found.dimension == 4
    assert set(found.decode(found.start).rules[0].parameters) == {"weight"}


# --- the strategies and their record ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_gives_the_same_search_again_and_another_seed_another(tmp_path, strategy):
    runs = [play(tmp_path / str(n), strategy, seed) for n, seed in enumerate((0, 0, 1))]
    assert without_time(runs[0]) == without_time(runs[1])
    assert without_time(runs[0]) != without_time(runs[2])
    assert len(runs[0]) == 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numpys_global_generator_is_left_alone(tmp_path, strategy):
    before = np.random.get_state()[1].tolist()
    play(tmp_path / "a", strategy)
    assert np.random.get_state()[1].tolist() == before


def test_cmaes_climbs(tmp_path):
    found = play(tmp_path / "a", count=200)
    assert found[0].value < -0.01
    assert max(c.value for c in found) > -0.003


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_goes_on_as_it_would_have(tmp_path, strategy):
    whole = play(tmp_path / "whole", strategy, count=31)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "cut", strategy, count=31, judge=Judge(stop_at=17))
    with (tmp_path / "cut").open("a") as file:
        file.write('{"id": "half a li')
    again = Judge()
    found = play(tmp_path / "cut", strategy, count=31, judge=again)
    assert without_time(found) == without_time(whole)
    assert len(again.searched) == 31 - 17


def test_the_deadline_ends_a_search_and_what_is_known_needs_no_time(tmp_path):
    play(tmp_path / "a", count=9)
    late = Judge()
    with pytest.raises(yardstick.OutOfTime):
        play(tmp_path / "a", count=10, judge=late, deadline=time.time() - 1)
    assert not late.searched
    assert len(play(tmp_path / "a", count=9, deadline=time.time() - 1)) == 9


def test_a_record_of_another_search_is_refused(tmp_path):
    play(tmp_path / "a", seed=0, count=4)
    with pytest.raises(ValueError, match="line 1 is of another search"):
        play(tmp_path / "a", seed=1, count=4)


def test_an_equal_recipe_is_scored_once_and_costs_nothing_more(tmp_path):
    judge = Judge()
    ledger = yardstick.Ledger(tmp_path / "a", judge.measures())
    recipe, other = (space().decode(np.full(8, value)) for value in (0.5, 0.6))
    values = [ledger(r) for r in (recipe, other, recipe)]
    assert values[0] == values[2] != values[1]
    assert judge.searched == [recipe.id, other.id]
    assert [c.documents for c in ledger.done] == [DOCUMENTS, DOCUMENTS, 0]


def test_the_holdout_is_measured_for_each_new_best_and_for_nothing_else(tmp_path):
    judge = Judge()
    found = play(tmp_path / "a", "random", count=40, judge=judge)
    best, expected = -math.inf, []
    for c in found:
        if c.value > best:
            best = c.value
            expected.append(c.id)
    assert judge.held == expected == [c.id for c in found if c.holdout is not None]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failed_candidate_is_charged_and_the_search_goes_on(tmp_path, strategy):
    judge = Judge(broken=lambda recipe: int(recipe.id[:2], 16) % 3 == 0)
    found = play(tmp_path / "a", strategy, count=40, judge=judge)
    failed = [c for c in found if c.value is None]
    assert len(found) == 40 and failed
    assert all(c.documents == DOCUMENTS and c.error == "it overflows" and c.holdout is None for c in failed)


# --- runs of mergesearch as curves ---


def trial(number: int, state: State = State.COMPLETE, minute: int | None = None, **values: Any) -> Trial:
    when = datetime.datetime(2026, 1, 1, 0, number if minute is None else minute) if state.ended else None
    return Trial(number, state, recipe_id=f"r{number}", recipe_data={"n": number}, ended_at=when, **values)


def counted(*numbers: int) -> dict[str, TaskScore]:
    return {f"task{n}": TaskScore(0.5, 0.1, count, "acc") for n, count in enumerate(numbers)}


def test_a_run_is_charged_for_all_that_it_asked():
    values = {0: 0.1, 1: 0.4, 3: 0.2}
    trials = [
        trial(0, scores=counted(5, 5)),
        trial(1, minute=9, scores=counted(5, 5), learning_documents=96),
        trial(2, State.PRUNED, partial=counted(2, 1)),
        trial(3, scores=counted(5, 5), same_as=0),
        trial(4, State.FAILED, error="no numbers"),
        trial(5, State.SCORED, scores=counted(5, 5)),
    ]
    curve = search.curve_of(trials, lambda trial: values[trial.number])
    assert [(c.id, c.value, c.documents) for c, _ in curve] == [
        ("r0", 0.1, 10),
        ("r2", None, 3),
        ("r3", 0.2, 0),
        ("r4", None, 0),
        ("r1", 0.4, 106),
    ]
    assert [c.id for c, _ in search.best_so_far(curve)] == ["r0", "r3", "r1"]


def test_every_search_has_a_file_of_its_own_and_its_budget(tmp_path):
    chosen = search.options([str(tmp_path), "--seeds", "3", "4"])
    units = search.units(chosen)
    assert len({unit.file for unit in units}) == len({unit.run for unit in units}) == len(units)
    unit = units[0]
    assert not unit.done
    unit.file.parent.mkdir(parents=True)
    unit.note.write_text("100")
    assert not unit.done
    unit.note.write_text("400")
    assert unit.done


# --- the report ---


def candidates(*rows):
    return [yardstick.Candidate(f"c{n}", value, cost, holdout) for n, (value, cost, holdout) in enumerate(rows)]


def measured():
    return {
        "cmaes": {
            0: candidates((0.1, 10, 0.0), (0.5, 10, 0.3), (0.4, 10, None), (0.6, 10, 0.2)),
            1: candidates((0.2, 10, 0.1), (None, 10, None), (0.3, 10, 0.3), (0.1, 10, None)),
        },
        "auto": {
            0: candidates((0.1, 5, 0.0), (0.7, 7, 0.5)),
            1: candidates((0.2, 5, 0.2), (0.25, 25, 0.4), (0.2, 20, None)),
        },
    }


def test_a_curve_tells_score_and_cost():
    curve = search_report.Curve(measured()["cmaes"][0])
    assert curve.points == [(10, 0.1, 0.0), (20, 0.5, 0.3), (40, 0.6, 0.2)]
    assert curve.at(39) == (0.5, 0.3)
    assert all(map(math.isnan, curve.at(9)))
    assert (curve.cost_of(0.5), curve.cost_of(0.61), curve.documents) == (20, math.inf, 40)


def test_the_report_compares_seed_by_seed_at_equal_cost():
    curves = {n: {s: search_report.Curve(c) for s, c in seeds.items()} for n, seeds in measured().items()}
    # seed 0: after 12 documents .5 and 0; seed 1: after 40 documents .4 and .3
    found = search_report.differences(curves["auto"], curves["cmaes"])
    assert [spent for spent, _ in found] == [12, 40]
    assert [difference for _, difference in found] == pytest.approx([0.5, 0.1])
    assert search_report.reach_cells(curves["auto"], curves["cmaes"]) == "1 of 2 | 12 | 0.300"


def test_what_is_left_out_of_auto_is_compared_with_auto():
    curves = {n: {s: search_report.Curve(c) for s, c in seeds.items()} for n, seeds in measured().items()}
    assert search_report.ablations(curves) == []
    rows = candidates((0.2, 12, 0.1)), candidates((0.35, 50, 0.6))
    curves["auto without racing"] = {seed: search_report.Curve(found) for seed, found in enumerate(rows)}
    # seed 0: .2 and .1 against .7 and .5; seed 1: .35 and .6 against .25 and .4
    *_, line, _ = search_report.ablations(curves)
    assert line.startswith("| auto without racing | 2 | -0.2000 ± ") and "| -0.7 | -0.1000 ± " in line


def test_the_interval_is_students():
    mean = search_report.Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean.value, mean.stderr) == (3.0, pytest.approx(math.sqrt(0.5)))
    assert mean.half == pytest.approx(2.776445 * math.sqrt(0.5))


def test_the_report_is_written_from_the_record(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results" / "search"
    (out / "curves").mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps({"config": "name: tiny", "overrides": ["batch_size=8"]}))
    for name, seeds in measured().items():
        for seed, found in seeds.items():
            lines = "".join(json.dumps(vars(c)) + "\n" for c in found)
            (out / "curves" / f"{name}-{seed}.jsonl").write_text(lines)
    read = search.read_all(out)
    assert without_time(read["auto"][1]) == without_time(measured()["auto"][1])
    chosen = search.options([str(out), "--results", str(results)])
    search_report.write(read, "cmaes", results, search.described(chosen))
    text = results.with_suffix(".md").read_text()
    assert "`tiny` with batch_size=8" in text and "| auto | 2 |" in text
    rows = list(csv.DictReader(results.with_suffix(".csv").open()))
    assert {(r["search"], r["seed"], r["documents"], r["holdout_score"]) for r in rows} >= {("auto", "1", "50", "0.4")}


def test_a_comparison_is_not_mixed_with_another(tmp_path, monkeypatch):
    chosen = search.options([str(tmp_path), "--only", "auto"])
    search.remember(chosen)
    search.remember(search.options([str(tmp_path), "--only", "greedy_soup", "cmaes"]))
    monkeypatch.setitem(search.RUNS, "auto", ["search.strategy=study"])
    with pytest.raises(SystemExit, match="'auto' as it was before it changed"):
        search.remember(chosen)
    with pytest.raises(SystemExit, match="another --config or --set"):
        search.remember(search.options([str(tmp_path), "--only", "cmaes", "--set", "batch_size=8"]))


def test_the_yardsticks_measure_real_candidates(tmp_path):
    """On the demo zoo of version 0.1, on few documents."""
    arguments = [str(tmp_path), "--seeds", "1", "--candidates", "2", "--only", "cmaes"]
    changes = [f"tasks.{n}.limit=4" for n in range(4)] + ["holdout=0.01", "device=cpu", "dtype=float32"]
    search.main(arguments + [part for change in changes for part in ("--set", change)])
    found = search.read_all(tmp_path)
    assert {name: len(seeds[1]) for name, seeds in found.items()} == {"cmaes": 2}
    assert all(c.documents == 16 for seeds in found.values() for c in seeds[1])
