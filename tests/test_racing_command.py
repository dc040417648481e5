"""A run that races, over the demo zoo of version 0.1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import QUICKSTART, mergesearch, small

from mergesearch.results.loading import load_run

OPTIONS = {"racing": "{blocks: 3}", "holdout": 0.03}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = mergesearch("run", QUICKSTART, *small(folder, trials=3, limit=12, **OPTIONS))
    assert done.status == 0, done.err
    return folder


def test_what_finished_a_race_has_the_score_of_the_score_verb(run: Path) -> None:
    found = load_run(run).records
    assert len(found) == 9 and {record.state for record in found} <= {"complete", "pruned"}
    proposed = max((r for r in found if r.objective is not None), key=lambda r: (r.name is None, r.objective))
    (run.parent / "recipe.yaml").write_text(json.dumps(dict(proposed.recipe)))
    scored = mergesearch("score", run.parent / "recipe.yaml", "--config", run / "config.yaml", "--format", "json")
    assert {task: found["value"] for task, found in json.loads(scored.out)["tasks"].items()} == {
        task: score.value for task, score in proposed.scores.items()
    }
    assert not (run / "scores" / "blocks" / proposed.recipe_id).exists()


def test_mistakes_in_racing_are_one_sentence(tmp_path: Path) -> None:
    for value, part in (("{block: 3}", "'blocks'"), ("{blocks: 1}", "2"), ("{error: 0}", "0")):
        done = mergesearch("run", QUICKSTART, *small(tmp_path / "run", racing=value))
        assert done.status == 2 and part in done.err and len(done.err.strip().splitlines()) == 1, done.err
