"""`mergesearch report` as its users meet it, over the demo zoo of version 0.1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import QUICKSTART, Done, mergesearch, small

from mergesearch.engine.live import Engine
from mergesearch.results.loading import load_run
from scripts.bench.shared import zoo1

OPTIONS = {"holdout": 0.03, "space__methods": "[linear]"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert mergesearch("run", QUICKSTART, *small(folder, trials=2, limit=8, **OPTIONS)).status == 0
    return folder


@pytest.fixture(scope="module")
def reported(run: Path) -> Done:
    return mergesearch("report", run, "--finalists", 1, "--format", "json")


def test_the_report_scores_the_finalists_on_the_holdout(run: Path, reported: Done) -> None:
    assert reported.status == 0, reported.err
    data = json.loads(reported.out)
    documents = json.loads((run / "documents.json").read_text())
    objective, *tasks = data["sections"]
    assert [section["name"] for section in tasks] == list(documents["holdout"])
    assert all(section["documents"] == len(documents["holdout"][section["name"]]) for section in tasks)
    records = load_run(run).records
    assert {row["candidate"] for row in objective["rows"]} >= {"base", *zoo1.MODELS, "average"}
    assert {row["trial"]: row["search"] for row in objective["rows"]}.items() <= {
        r.number: r.objective for r in records
    }.items()
    baselines = {record.name for record in records if record.name}
    assert len(objective["rows"]) == len(baselines) + 1
    assert len(data["noise"]) == 5 and "mprovement" in data["sentence"]


def test_its_scores_are_those_of_the_score_verb(run: Path, reported: Done) -> None:
    on = ("--config", run / "config.yaml", "--on", "holdout", "--format", "json")
    scored = json.loads(mergesearch("score", zoo1.MODELS["names"], *on).out)["tasks"]
    for section in json.loads(reported.out)["sections"][1:]:
        (row,) = (row for row in section["rows"] if row["candidate"] == "names")
        assert row["holdout"]["value"] == scored[section["name"]]["value"]


def test_a_second_call_scores_nothing_again(run: Path, reported: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> float:
        raise AssertionError("nothing is to be built")

    monkeypatch.setattr(Engine, "load", load)
    again = mergesearch("report", run, "--finalists", 1, "--format", "json")
    assert again.status == 0 and again.out == reported.out and again.err == ""
    text = mergesearch("report", run, "--finalists", 1).out
    assert json.loads(reported.out)["sentence"] in " ".join(text.split())
    assert "## objective" in mergesearch("report", run, "--finalists", 1, "--format", "md").out


def test_cards_get_the_holdout_figures(run: Path, reported: Done, tmp_path: Path) -> None:
    sentence = json.loads(reported.out)["sentence"]
    assert sentence in (run / "best" / "README.md").read_text()
    assert mergesearch("export", run, tmp_path / "out").status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Holdout" in card and sentence in card and card.index("## Scores") < card.index("## Holdout")
    assert mergesearch("export", run, tmp_path / "names", "--trial", 3).status == 0
    assert sentence not in (tmp_path / "names" / "README.md").read_text()


def test_mistakes_are_one_sentence(run: Path, tmp_path: Path) -> None:
    for arguments, part in (
        (["report", "nowhere"], "no run folder"),
        (["report", run, "--format", "html"], "'html'"),
        (["report", run, "--finalists", 0], "finalists"),
    ):
        done = mergesearch(*arguments)
        assert done.status == 2 and part in done.err and len(done.err.strip().splitlines()) == 1, done.err


def test_without_a_holdout_there_is_nothing_to_report(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text().replace("holdout: 0.03", "holdout: 0.0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(str(run), str(tmp_path / "run")))
    (tmp_path / "run" / "study.db").write_bytes((run / "study.db").read_bytes())
    done = mergesearch("report", tmp_path / "run")
    assert done.status == 2 and len(done.err.strip().splitlines()) == 1


def test_documents_that_changed_since_the_search_are_refused(run: Path, reported: Done, tmp_path: Path) -> None:
    documents = json.loads((run / "documents.json").read_text())
    changed = {**documents, "holdout": {task: ids[1:] for task, ids in documents["holdout"].items()}}
    (run / "documents.json").write_text(json.dumps(changed))
    try:
        done = mergesearch("report", run, "--finalists", 2)
    finally:
        (run / "documents.json").write_text(json.dumps(documents))
    assert done.status == 2 and "no longer those" in done.err
