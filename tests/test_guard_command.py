"""A run with a guard, a tie-break, a smooth metric and a race, over the demo zoo of version 0.1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import QUICKSTART, mergesearch

from mergesearch.results.loading import load_run

OPTIONS = {
    "holdout": 0.03,
    "space__methods": "[linear]",
    "racing": "{blocks: 3}",
    "objective": "{scale: parents, tie_break: gold_prob}",
    "tasks": "[{task: zoo_code, limit: 10}, {task: zoo_names, metric: gold_prob, limit: 10}]",
    "guard": "[{task: zoo_strings, max_drop: 0.0, against: best, limit: 10}]",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = [part for key, value in OPTIONS.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    options = ("--set", "dtype=float32", "--set", "search.trials=2", "--set", f"output={folder}")
    done = mergesearch("run", QUICKSTART, *options, *changes)
    assert done.status == 0, done.err
    assert "note: guard zoo_strings: exact_match at least" in done.out
    assert "note: gold_prob breaks ties" in done.out
    return folder


def test_the_table_shows_guards_and_marks_who_breaks_them(run: Path) -> None:
    loaded = load_run(run)
    found, objective = loaded.records, loaded.objective
    assert objective.guards[0].against == "strings" and set(objective.weights) == {"zoo_code", "zoo_names"}
    by_name = {record.name: record for record in found if record.name}
    assert by_name["strings"].infeasible is None
    assert by_name["base"].infeasible.startswith("zoo_strings exact_match")
    rows = {row["trial"]: row for row in json.loads(mergesearch("table", run, "--format", "json").out)}
    assert rows[by_name["base"].number]["state"] == "infeasible"
    assert rows[by_name["strings"].number]["zoo_strings"] is not None
    assert by_name["code"].scores["zoo_names"].metric == "gold_prob"


def test_the_winner_keeps_the_guard_in_the_report_too(run: Path) -> None:
    done = mergesearch("report", run, "--finalists", 1, "--format", "json")
    assert done.status == 0, done.err
    data = json.loads(done.out)
    found = load_run(run).records
    winner = next(r for r in found if data["winner"] in (r.name, f"trial {r.number}"))
    assert winner.infeasible is None
    assert [(guard["task"], guard["against"]) for guard in data["guards"]] == [("zoo_strings", "strings")]
    assert [section["name"] for section in data["sections"]] == ["objective", "zoo_code", "zoo_names", "zoo_strings"]


def test_a_guard_without_the_metric_it_names_is_one_sentence(tmp_path: Path) -> None:
    guard = "guard=[{task: zoo_strings, metric: gold_prob, max_drop: 0}]"
    options = ("--set", f"output={tmp_path / 'run'}", "--set", "tasks=[{task: zoo_code}]", "--set", guard)
    done = mergesearch("run", QUICKSTART, *options)
    assert done.status == 2 and "has no gold_prob" in done.err and len(done.err.strip().splitlines()) == 1, done.err
