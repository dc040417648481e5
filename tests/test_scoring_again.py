"""A search scored by token tries, and what lm-eval's own model says beside it: in the study, table, card and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from support.commands import QUICKSTART, mergesearch, sets, small

from mergesearch import load_run
from mergesearch.search import by_lm_eval
from mergesearch.search.store import open_run

TRIED = ("zoo_code", "zoo_names", "zoo_strings")  # zoo_prose is loglikelihood_rolling, which lm-eval always answers
OPTIONS = {"scoring": "auto", "report__finalists": 1, "report__documents": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = mergesearch("run", QUICKSTART, *small(folder, trials=1, limit=8, **OPTIONS))
    assert done.status == 0, done.err
    assert "scoring 7 candidates once more by lm-eval's own model" in done.err
    return folder


def test_parents_average_and_winner_are_scored_once_more(finished):
    run = load_run(finished)
    assert run.kinds == {"loglikelihood": "tries", "generate_until": "tries"}
    winner = run.best()
    for record in run.records:
        known = record.name in (*run.config.parents, "average") or record.number == winner.number
        assert set(record.by_lm_eval) == (set(TRIED) if known else set()), record.number
        assert all(record.by_lm_eval[task].documents == 8 for task in record.by_lm_eval)
        assert record.shown.keys() == record.scores.keys()


def test_the_card_has_what_lm_eval_gives(finished):
    run = load_run(finished)
    config = finished / "config.yaml"
    found = json.loads(mergesearch("score", finished / "best", "--config", config, "--format", "json").out)["tasks"]
    winner = run.best()
    for task, score in winner.shown.items():
        assert found[task]["value"] == score.value, task
    card = (finished / "best" / "README.md").read_text()
    assert "those of lm-eval's own model; the objective is what the search saw, by token tries" in card
    assert f"{winner.shown['zoo_code'].value:.4f}" in card


def test_the_table_marks_which_is_which(finished):
    shown = mergesearch("table", finished).out
    assert "log-likelihoods and generated answers were scored by token tries" in shown
    assert "= lm-eval's own model gives these figures too" in shown
    rows = json.loads(mergesearch("table", finished, "--format", "json").out)
    beside = [row for row in rows if row["zoo_code_lm_eval"] is not None]
    assert len(beside) == 7 and all(row["zoo_prose"] is not None and "zoo_prose_lm_eval" not in row for row in rows)
    assert "(lm_eval " in mergesearch("table", finished, "--format", "md").out


def test_figures_that_differ_are_named(finished):
    _, study = open_run(finished)
    before = study.user_attrs[by_lm_eval.FIGURES]
    changed = json.loads(json.dumps(before))
    changed["0"]["tasks"]["zoo_code"]["value"] = 0.987654
    study.set_user_attr(by_lm_eval.FIGURES, changed)
    try:
        shown = mergesearch("table", finished).out
        assert "≠ it gives others, named below" in shown and "by lm-eval 0.9877" in shown
    finally:
        study.set_user_attr(by_lm_eval.FIGURES, before)


def test_a_run_is_of_one_kind(finished):
    done = mergesearch("run", QUICKSTART, *small(finished, trials=1, limit=8, **{**OPTIONS, "scoring": "lm_eval"}))
    assert done.status == 2 and "scoring: 'lm_eval', there 'auto'" in done.err
    # what was noted stands, whatever a later worker finds
    _, study = open_run(finished)
    assert by_lm_eval.agree(study, {"loglikelihood": "lm_eval"}) == by_lm_eval.kinds(study)


def test_the_report_is_lm_evals(finished):
    done = mergesearch("report", finished)
    assert done.status == 0, done.err
    assert "figures on the holdout are lm-eval's own model's; those of the search are by token tries" in done.out
    assert "requests shuffled, batch size 42 instead of 64" in done.out


def test_another_trial_is_scored_once_more_for_its_card(finished, tmp_path):
    run = load_run(finished)
    other = next(record for record in run.records if record.scores and not record.by_lm_eval)
    assert mergesearch("export", finished, tmp_path / "out", "--trial", other.number).status == 0
    assert "those of lm-eval's own model" in (tmp_path / "out" / "README.md").read_text()


def test_check_counts_it(finished, tmp_path):
    done = mergesearch("check", QUICKSTART, *small(tmp_path / "run", trials=1, limit=30, **OPTIONS))
    assert done.status == 0 and "scoring once more by lm-eval" in done.out
    quiet = mergesearch("check", QUICKSTART, *small(tmp_path / "run", trials=1, limit=8), *sets(scoring="lm_eval"))
    assert "once more" not in quiet.out
