"""`mergesearch report` as its users meet it, over the demo zoo of version 0.1."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import QUICKSTART, Done, mergesearch, small

from mergesearch.commands import report
from mergesearch.commands.report import cost, report_at_end
from mergesearch.config import ReportConfig
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.results.loading import load_run
from mergesearch.results.report.finalists import choose
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


def test_whose_worst_task_counts_is_said(run: Path) -> None:
    found = load_run(run)
    best, objective = found.best(), found.objective
    assert best is not None and objective is not None
    chosen = choose(found.records, found.config, 3)
    notes = report._notes(found, replace(objective, worst=0.5), (), chosen, None)
    lowest = min(zip(objective.values(best.scores), objective.weights, strict=True))[1]
    assert any(f"the worst task of each candidate is taken to be {lowest}, the winner's" in note for note in notes)
    assert not any("worst task" in note for note in report._notes(found, objective, (), chosen, None))


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


def figures(section: dict[str, Any]) -> dict[str, float]:
    return {row["candidate"]: row["holdout"]["value"] for row in section["rows"]}


def test_a_part_of_the_holdout_first_and_the_rest_later(run: Path, reported: Done, tmp_path: Path) -> None:
    """The figures are those of a report on everything, the cost is said, and two looks are called two."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("holdout", "best", "workers"))
    cost_before = cost(load_run(folder), 1, 4)
    assert cost_before.each == 16 and cost_before.again and cost_before.seconds > 0
    few = mergesearch("report", folder, "--finalists", 1, "--documents", 4, "--format", "json")
    assert few.status == 0 and str(cost_before).partition(": ")[2] in few.err
    assert few.err.count(" s\n") == cost_before.candidates + 1
    data = json.loads(few.out)
    assert {section["documents"] for section in data["sections"][1:]} == {4}
    assert any("at most 4 documents of each task" in note for note in data["notes"])
    assert cost(load_run(folder), 1, 4).documents == 0
    whole = mergesearch("report", folder, "--finalists", 1, "--format", "json")
    found, alone = json.loads(whole.out), json.loads(reported.out)
    for ours, theirs in zip(found["sections"], alone["sections"], strict=True):
        # other documents beside it in a batch move a document's last bits
        assert figures(ours) == pytest.approx(figures(theirs), abs=1e-5) and ours["documents"] == theirs["documents"]
    assert any("this is look 2 at the holdout, after one on at most 4 documents" in note for note in found["notes"])
    assert [look["documents"] for look in json.loads((folder / "holdout" / "looks.json").read_text())] == [4, None]
    again = mergesearch("report", folder, "--finalists", 1, "--documents", 4, "--format", "json")
    assert again.err == "" and json.loads(again.out)["sections"] == found["sections"]


def test_the_block_in_the_configuration_may_change_and_the_command_line_overrides_it(run: Path) -> None:
    config = load_run(run).config
    other = config.model_copy(update={"report": ReportConfig(finalists=1, documents=3, at_end=True)})
    assert config.report == ReportConfig() and config.differences(other) == []
    changed = replace(load_run(run), config=other, path=run / "nowhere")
    with pytest.raises(UserError, match="which documents the run uses"):
        cost(changed)
    assert cost(replace(load_run(run), config=config.model_copy(update={"holdout": 0.0}))) is None


def test_a_run_ends_with_the_report_where_it_is_asked_to(run: Path, reported: Done, tmp_path: Path) -> None:
    loaded = load_run(run)
    wanted = replace(loaded, config=loaded.config.model_copy(update={"report": ReportConfig(finalists=1, at_end=True)}))
    nothing: Any = None  # everything was scored, so that no engine is needed
    assert report_at_end(loaded, nothing) is None
    assert report_at_end(wanted, nothing).sentence == json.loads(reported.out)["sentence"]
    busy = replace(wanted, records=(*wanted.records, replace(wanted.records[-1], state="running")))
    assert report_at_end(busy, nothing) is None
