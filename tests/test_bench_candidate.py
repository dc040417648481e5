"""scripts/bench/candidate.py: what is compared is what a person would do."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from scripts.bench import candidate

LABELS = {"zero-shot": "bench_1", "few-shot, fixed": "bench_0", "generation": "bench_7"}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The bench without its models, and the commands that it starts."""
    made = candidate.Bench.__new__(candidate.Bench)
    made.given = Namespace(dtype="float32", device="cpu")
    made.folder, made.labels = tmp_path, LABELS
    monkeypatch.setattr(candidate.Bench, "recipe", lambda self, weight: weight)
    monkeypatch.setattr(candidate, "export", lambda recipe: (f"weight: {recipe}", []))
    made.tried = {8: 3.0, 32: 2.0}
    started: list[list[str]] = []

    def command(name: str, *arguments: object) -> None:
        started.append([name, *map(str, arguments)])
        if name == "lm_eval":
            labels = started[-1][started[-1].index("--tasks") + 1].split(",")
            out = Path(started[-1][started[-1].index("--output_path") + 1])
            out.mkdir()
            (out / "results_1.json").write_text(json.dumps({"results": {each: {"acc,none": 0.5} for each in labels}}))

    monkeypatch.setattr(candidate, "command", command)
    return made, started


def test_lm_eval_is_started_once_a_candidate_with_all_tasks_and_the_batch_size_that_is_best_for_them(bench):
    made, started = bench
    spent, scores = made.on_disk(0.3)
    assert [each[0] for each in started] == ["mergekit-yaml", "lm_eval"]
    line = started[1]
    assert set(line[line.index("--tasks") + 1].split(",")) == set(LABELS.values()) == set(scores)
    assert line[line.index("--batch_size") + 1] == "32"
    assert set(spent) == {"merge", candidate.BOTH}
    assert "--cuda" not in started[0]


def test_what_is_measured_on_a_gpu_is_merged_there_by_mergekit_too(bench):
    made, started = bench
    made.given.device = "cuda"
    made.on_disk(0.3)
    assert "--cuda" in started[0] and started[1][started[1].index("--device") + 1] == "cuda"


def test_the_page_adds_up_what_the_command_took():
    given = Namespace(
        model=Path("m"), device="cpu", dtype="float32", documents=24, repeats=3, trials=12, out=candidate.PAGE
    )
    rows = {
        "mergesearch": {"merge": (1.0, 1.0), "log-likelihood": (1.0, 1.0), "generation": (2.0, 2.0)},
        "(a)": {"merge": (10.0, 10.0), candidate.BOTH: (30.0, 30.0)},
    }
    (line,) = [line for line in "\n".join(candidate.page(given, rows)).splitlines() if line.startswith("| (a)")]
    assert "30.00 / 30.00, with generation" in line and line.endswith("| 40.00 / 40.00 | 10.0 | 10.0 |")
