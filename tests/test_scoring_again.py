"""A search scored by token tries, and what lm-eval's own model says beside it: in the study, table, card and report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import optuna
from support.commands import mergesearch, sets
from support.evaluate_tiny import make_model, make_tokenizer
from support.searches import settings
from support.tiny_run import write_tiny_run

from mergesearch import load_run
from mergesearch.commands.run import Session
from mergesearch.config import TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import load
from mergesearch.results.loading import BATCH_SIZE, SETTLED
from mergesearch.search import by_lm_eval, store
from mergesearch.search.costs import words_of
from mergesearch.search.estimate import estimate
from mergesearch.search.speed import Probe
from mergesearch.search.store import open_run

TRIED = ("tiny_choice", "tiny_copy")  # tiny_passages is loglikelihood_rolling, which lm-eval always answers
METRICS = {"tiny_choice": "acc", "tiny_copy": "exact_match,word", "tiny_passages": "bits_per_byte"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_run(
        folder,
        tasks=[{"task": task, "metric": metric, "limit": 6} for task, metric in METRICS.items()],
        guard=[{"task": "tiny_copy", "metric": "length", "max_drop": 0}],
        report={"finalists": 1, "documents": 3},
        output=str(folder / "run"),
    )


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    done = mergesearch("run", config)
    assert done.status == 0, done.err
    assert "once more by lm-eval's own model: parents, average and winner" in done.err
    assert "answers were generated at" in done.out
    assert "tokenizer: the base's 257 tokens, the same in every model" in done.out
    return config.parent / "run"


def test_parents_average_and_winner_are_scored_once_more(finished):
    run = load_run(finished)
    assert run.kinds == {"loglikelihood": "tries", "generate_until": "tries"}
    winner = run.best()
    for record in run.records:
        known = record.name in (*run.config.parents, "average") or record.number == winner.number
        assert set(record.by_lm_eval) == (set(TRIED) if known else set()), record.number
        assert all(record.by_lm_eval[task].documents == 6 for task in record.by_lm_eval)
        assert record.shown.keys() == record.scores.keys()


def test_the_card_has_what_lm_eval_gives(finished):
    run = load_run(finished)
    found = json.loads(
        mergesearch("score", finished / "best", "--config", finished / "config.yaml", "--format", "json").out
    )["tasks"]
    winner = run.best()
    for task, score in winner.shown.items():
        assert found[task]["value"] == score.value, task
    card = (finished / "best" / "README.md").read_text()
    assert "those of lm-eval's own model; the objective is what the search saw, by token tries" in card
    assert f"{winner.shown['tiny_choice'].value:.4f}" in card


def test_the_table_marks_which_is_which(finished):
    shown = mergesearch("table", finished).out
    assert "log-likelihoods and generated answers were scored by token tries" in shown
    assert "= lm-eval's own model gives these figures too" in shown
    rows = json.loads(mergesearch("table", finished, "--format", "json").out)
    beside = [row for row in rows if row["tiny_choice_lm_eval"] is not None]
    assert 4 <= len(beside) <= 5 and all(
        row["tiny_passages"] is not None and "tiny_passages_lm_eval" not in row for row in rows
    )
    assert "(lm_eval " in mergesearch("table", finished, "--format", "md").out


def test_figures_that_differ_are_named(finished):
    _, study = open_run(finished)
    before = study.user_attrs[by_lm_eval.FIGURES]
    changed = json.loads(json.dumps(before))
    changed["0"]["tasks"]["tiny_choice"]["value"] = 0.987654
    study.set_user_attr(by_lm_eval.FIGURES, changed)
    try:
        shown = mergesearch("table", finished).out
        assert "≠ it gives others, named below" in shown and "by lm-eval 0.9877" in shown
    finally:
        study.set_user_attr(by_lm_eval.FIGURES, before)


def test_a_run_is_of_one_kind(config, finished):
    done = mergesearch("run", config, *sets(scoring="lm_eval"))
    assert done.status == 2 and "scoring: 'lm_eval', there 'auto'" in done.err
    # what was noted stands, whatever a later worker finds; one that cannot do it is refused
    _, study = open_run(finished)
    other = {"loglikelihood": "tries, head in float32", "generate_until": "tries"}
    assert by_lm_eval.agree(study, other) == by_lm_eval.kinds(study)
    with pytest.raises(UserError, match="this worker cannot score generated answers as the run's other workers do"):
        by_lm_eval.agree(study, {**other, "generate_until": "lm_eval"})


def test_the_report_is_lm_evals(finished):
    done = mergesearch("report", finished)
    assert done.status == 0, done.err
    assert "figures on the holdout are lm-eval's own model's; those of the search are by token tries" in done.out
    assert "requests shuffled, batch size 4 instead of 6" in done.out
    # a guard on the length of a task's answers, on the documents of the task's own holdout
    assert "Guard tiny_copy, length (length), on the holdout" in done.out and ": kept." in done.out
    objective = load_run(finished).objective
    assert objective.guards[0].reference == load_run(finished).records[0].scores["tiny_copy"].length == 4


def test_another_trial_is_scored_once_more_for_its_card(finished, tmp_path):
    run = load_run(finished)
    other = next(record for record in run.records if record.scores and not record.by_lm_eval)
    assert mergesearch("export", finished, tmp_path / "out", "--trial", other.number).status == 0
    assert "those of lm-eval's own model" in (tmp_path / "out" / "README.md").read_text()


def test_the_estimate_counts_it(tmp_path):
    probe = Probe({"quiz": 10, "bits": 10}, {"quiz": 0.5, "bits": 0.1}, merge=1.0, learning=0.25)
    before, after = (estimate(settings(tmp_path), probe=replace(probe, again=again)) for again in (0.0, 50.0))
    assert after.seconds == before.seconds + 50.0
    assert "scoring once more by lm-eval 50 s" in words_of(after) and "once more" not in words_of(before)


def test_lm_evals_own_model_asks_as_many_at_once_as_was_found_by_trying(config):
    """What the card's command says, and not what a first worker began with."""
    tasks = load([TaskConfig(task="tiny_choice", metric="acc")], [str(config.parent / "tasks")])
    scorer = Scorer(make_model(0), make_tokenizer(), tasks, {"tiny_choice": range(6)}, batch_size=64)
    scorer.language_model.batch_size_per_gpu = 3
    plain = scorer.by_lm_eval()
    assert plain is not None and plain.batch_size == 3


def test_what_running_out_of_memory_left_to_either_of_them_is_noted():
    study = optuna.create_study()
    store.note(study, SETTLED, {BATCH_SIZE: 16})
    session: Any = SimpleNamespace(
        search=SimpleNamespace(study=study),
        config=SimpleNamespace(batch_size="auto"),
        scorer=SimpleNamespace(batch_size=16),
        plain=SimpleNamespace(batch_size=4),
    )
    Session._note_batch_size(session)
    assert store.noted(study, SETTLED) == {BATCH_SIZE: 4}
    session.plain = None
    Session._note_batch_size(session)
    assert store.noted(study, SETTLED) == {BATCH_SIZE: 4}
