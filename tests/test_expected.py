"""What candidates are expected to score elsewhere, against formulas and over searches whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import optuna
import pytest
from support.races import SIZE, start
from support.table_records import RECORDS

from mergesearch.commands.story import story_of
from mergesearch.evaluate.expected import Expected, expect
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore, load_documents
from mergesearch.results.card import model_card
from mergesearch.results.loading import load_run, recipe_of
from mergesearch.results.record import ranked
from mergesearch.results.report.finalists import choose
from mergesearch.results.table import render, table_rows
from mergesearch.search.expectations import expectations, without_learned_gold
from mergesearch.search.history import History
from mergesearch.search.objective import Objective, Scale
from mergesearch.search.store import RunFolder, write_documents
from mergesearch.search.trials import State, Trial, at
from scripts.bench import winner
from scripts.bench.winner import Found, Recording, World, look

SEARCHES = 25


def documents(values: np.ndarray, kind: str = "mean", gold: np.ndarray | None = None) -> dict[str, DocumentScores]:
    return {"quiz": DocumentScores(list(range(len(values))), values, kind, gold)}


def found(world: World, searches: int = SEARCHES) -> list[Found]:
    return [look(world.draw(seed)) for seed in range(searches)]


def mean(results: list[Found], name: str) -> float:
    return float(np.mean([getattr(each, name) for each in results]))


# --- the estimate ---


def test_one_candidate_is_its_score_with_its_standard_error() -> None:
    values = np.random.default_rng(0).random(50)
    (alone,) = expect([documents(values)], {"quiz": 2.0})
    assert alone.value == pytest.approx(2 * values.mean())
    assert alone.stderr == pytest.approx(2 * values.std(ddof=1) / math.sqrt(50), rel=0.05)
    assert alone.high - alone.value == pytest.approx(2.0096 * alone.stderr, rel=1e-3)  # Student's with 49 degrees
    assert expect([], {"quiz": 1.0}) == []


def test_a_clear_lead_is_kept_and_a_small_one_among_many_is_not() -> None:
    rng = np.random.default_rng(1)
    shared, own = rng.normal(0, 1, 200), rng.normal(0, 0.3, (20, 200))
    own -= own.mean(axis=1, keepdims=True)
    scores = np.zeros(20)
    scores[3], scores[7] = 0.01, 1.0  # a half of the standard error of a difference, and fifty of them
    values = [each.value for each in expect([documents(shared + o + s) for o, s in zip(own, scores, strict=True)],
                                            {"quiz": 1.0})]  # fmt: skip
    raw = shared.mean() + scores
    assert abs(values[7] - raw[7]) < 0.01
    assert 0 < values[3] - np.median(values) < 0.006
    assert np.argmax(values) == 7


def test_the_order_of_candidates_and_of_documents_and_the_unit_do_not_matter() -> None:
    draw = World("", 15, 60, 0.05).draw(3)
    plain = [each.value for each in expect(draw.candidates, {"quiz": 1.0})]
    turned = [each.value for each in expect(list(draw.candidates)[::-1], {"quiz": 1.0})]
    assert turned[::-1] == pytest.approx(plain)
    moved = [
        {"quiz": DocumentScores([5 * i for i in each["quiz"].ids], each["quiz"].values, "mean", each["quiz"].gold)}
        for each in draw.candidates
    ]
    assert [each.value for each in expect(moved, {"quiz": 1.0})] == pytest.approx(plain)
    assert [each.value for each in expect(draw.candidates, {"quiz": -3.0})] != pytest.approx(plain)
    triple = expect(draw.candidates, {"quiz": 3.0})
    assert [each.value / 3 for each in triple] == pytest.approx(plain)
    assert triple[0].stderr / 3 == pytest.approx(expect(draw.candidates, {"quiz": 1.0})[0].stderr)


def test_every_aggregation_and_missing_gold_are_taken() -> None:
    rng = np.random.default_rng(2)
    pairs = [np.stack([-rng.random(40) * 30, np.full(40, 20.0)], axis=1) for _ in range(12)]
    jack = [rng.random(40) for _ in range(12)]
    gold = [np.where(np.arange(40) < 5, np.nan, -rng.random(40)) for _ in range(12)]
    candidates = [
        {
            "bits": DocumentScores(list(range(40)), pair, "bits_per_byte"),
            "f1": DocumentScores(list(range(40)), pseudo, "jackknife"),
            "quiz": DocumentScores(list(range(40)), (logs > -0.5).astype(float), "mean", logs),
        }
        for pair, pseudo, logs in zip(pairs, jack, gold, strict=True)
    ]
    results = expect(candidates, {"bits": -1.0, "f1": 1.0, "quiz": 1.0})
    assert all(math.isfinite(x) for each in results for x in (each.value, each.stderr, each.low, each.high))
    assert all(each.low < each.value < each.high and each.behind <= each.stderr * 2 for each in results)
    with pytest.raises(ValueError, match="no document"):
        expect([documents(np.array([np.nan, np.nan])), documents(np.ones(2))], {"quiz": 1.0})


def test_whom_a_race_stopped_is_judged_by_the_same_documents() -> None:
    """Half of the documents are easy; whoever was asked the easy half alone is not better for it."""
    rng = np.random.default_rng(3)
    easy = np.repeat([1.0, 0.0], 50)
    whole = [documents(easy + rng.normal(0, 0.05, 100)) for _ in range(8)]
    part = {"quiz": DocumentScores(list(range(50)), easy[:50] + rng.normal(0, 0.05, 50), "mean")}
    *_, stopped = expect([*whole, part], {"quiz": 1.0})
    assert stopped.value == pytest.approx(0.5, abs=0.03)


# --- over searches whose truth is known ---


def test_among_equal_trials_the_luck_of_the_best_is_taken_away() -> None:
    results = found(World("", 40, 100, 0.0))
    assert mean(results, "bias_of_score") > 1.3
    assert mean(results, "bias") < 0.4
    assert mean(results, "covered") > 0.85


def test_controls_find_a_better_winner_and_the_estimate_is_unbiased() -> None:
    results = found(World("", 30, 100, 0.03, bad=30))
    assert mean(results, "chosen") > mean(results, "highest") + 0.002
    assert abs(mean(results, "bias")) < 0.35 < mean(results, "bias_of_score")
    assert mean(results, "covered_of_all") > 0.85


def test_on_the_recorded_zoo_the_winner_is_better_than_the_highest() -> None:
    recording = Recording.read(winner.DATA / "zoo_matrix.npz")
    results = [look(recording.draw(100, seed)) for seed in range(10)]
    assert mean(results, "chosen") > mean(results, "highest")
    assert abs(mean(results, "bias")) < 0.5 * mean(results, "bias_of_score")
    assert len(winner.cells(results)) == len(winner.TITLES)


# --- in a run ---


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that raced, and stopped some."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    start(folder, trials=10).run()
    write_documents(RunFolder(folder), {"search": {"quiz": list(range(SIZE))}, "holdout": {}})
    return folder


def test_a_run_ranks_by_what_is_expected_and_keeps_what_it_found(raced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(raced)
    complete = [record for record in run.records if record.objective is not None]
    stopped = [record for record in run.records if record.state == State.PRUNED.value]
    assert complete and stopped
    assert all(record.expected is not None for record in complete)
    assert all(record.expected is None for record in stopped)
    # what races stopped counts with the documents that it has
    assert all(len(load_documents(run.folder.documents(r.number))["quiz"].ids) < SIZE for r in stopped)
    values = [record.worth for record in ranked(complete)]
    assert values == sorted(values, reverse=True)
    best = run.best()
    assert best is not None and best.number == ranked(complete)[0].number
    assert choose(run.records, run.config, 3).winner == best
    assert best.expected is not None and best.expected.low < best.expected.value < best.objective
    # found once
    monkeypatch.setattr("mergesearch.search.expectations.expect", lambda *_: pytest.fail("found again"))
    assert load_run(raced).records == run.records
    run.folder.expected.write_text("{}")
    with pytest.raises(pytest.fail.Exception):
        load_run(raced)


def test_what_a_soup_was_learned_by_tells_it_from_no_one(raced: Path) -> None:
    """Its probabilities of what is right are what was learned; of all others too they are left out then."""
    url = f"sqlite:///{raced / 'study.db'}"
    plain = at(optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url), 0)
    learned = {
        "by loss": replace(plain, strategy="learned_soup", key={"per": "tensor", "loss": "cross_entropy"}),
        "by entropy": replace(plain, strategy="learned_soup", key={"per": "tensor", "loss": "entropy"}),
        "by scores": replace(plain, strategy="learned_soup", key={"per": "tensor", "gradients": False, "loss": None}),
        "not": plain,
    }
    known = {0: documents(np.ones(3), gold=np.zeros(3)), 1: documents(np.zeros(3), gold=np.ones(3))}
    for name, trial in learned.items():
        found = without_learned_gold([trial, replace(plain, number=1)], known)
        assert all((each["quiz"].gold is None) == (name == "by loss") for each in found.values()), name
        assert [each["quiz"].values.sum() for each in found.values()] == [3, 0]
    # a trial whose documents are lost says nothing
    assert without_learned_gold([replace(learned["by loss"], number=7)], known) is known


def test_with_a_share_for_the_worst_task_no_trial_is_expected_far_from_its_score(raced: Path, tmp_path: Path) -> None:
    """The worst task is each trial's own, and not that of the base, of which all are alike."""
    url, rng = f"sqlite:///{raced / 'study.db'}", np.random.default_rng(0)
    plain = at(optuna.load_study(study_name=optuna.get_all_study_names(url)[0], storage=url), 0)
    folder, hard = RunFolder(tmp_path), {task: rng.random(400) for task in "ab"}

    def scored(number: int, *levels: float) -> Trial:
        known = {}
        for task, level in zip("ab", levels, strict=True):
            values = (np.clip(hard[task] + rng.normal(0, 0.1, 400), 0, 1) < level).astype(float)
            known[task] = DocumentScores(list(range(400)), values, "mean")
        scores = {task: TaskScore(float(each.values.mean()), 0.02, 400, "acc") for task, each in known.items()}
        folder.documents(number).parent.mkdir(exist_ok=True)
        Scores(scores, known).save_documents(folder.documents(number))
        return replace(plain, number=number, state=State.COMPLETE, scores=scores, strategy="study", key={})

    levels = [(0.1, 0.1), (0.8, 0.1), (0.1, 0.8), (0.95, 0.25), (0.5, 0.5), (0.9, 0.3), (0.6, 0.5), (0.45, 0.55)]
    trials = [scored(number, *each) for number, each in enumerate(levels)]
    objective = Objective({"a": 1.0, "b": 3.0}, dict.fromkeys("ab", Scale(0.1, 0.7)), worst=0.5)
    found = expectations(cast(History, SimpleNamespace(trials=trials, objective=objective)), folder)
    values = {trial.number: objective.value(trial.scores) for trial in trials}
    assert {number: each.value for number, each in found.items()} == pytest.approx(values, abs=0.03)
    assert max(found, key=lambda number: found[number].value) == max(values, key=lambda number: values[number]) == 6
    assert all(each.low < values[number] < each.high for number, each in found.items())


def test_candidates_without_noise_are_expected_to_score_what_they_scored() -> None:
    """Three documents that all answer alike, but two candidates none of them: nobody is near whom EM begins with."""
    values = np.ones(3)
    found = expect([documents(0 * values), documents(0 * values), *[documents(values)] * 4], {"quiz": 1.0})
    assert [each.value for each in found] == pytest.approx([0, 0, 1, 1, 1, 1], abs=1e-6)


def test_a_trial_whose_documents_are_lost_is_not_the_best_for_it(raced: Path) -> None:
    run = load_run(raced)
    first = ranked(run.records)[0]
    kept = run.folder.documents(first.number).read_bytes()
    run.folder.documents(first.number).write_bytes(b"damaged")
    again = load_run(raced)
    guessed = next(record for record in again.records if record.number == first.number)
    run.folder.documents(first.number).write_bytes(kept)
    assert first.expected is not None and guessed.expected is not None and first.objective is not None
    assert guessed.expected.value < first.objective
    for record in run.records:
        run.folder.documents(record.number).rename(raced / f"{record.number}.away") if record.scores else None
    assert all(record.expected is None for record in load_run(raced).records)
    assert load_run(raced).best() is not None
    for record in run.records:
        if record.scores:
            (raced / f"{record.number}.away").rename(run.folder.documents(record.number))


def test_table_card_and_report_show_it_beside_the_score(raced: Path) -> None:
    run = load_run(raced)
    best = run.best()
    assert best is not None and best.expected is not None
    row = table_rows(run.records, top=1)[0]
    assert (row["expected"], row["expected_low"], row["expected_high"]) == (
        best.expected.value,
        best.expected.low,
        best.expected.high,
    )
    shown = f"{best.expected.value:.4f}"
    assert f"{shown} [{best.expected.low:.4f}, " in render(run.records, "md")
    text = str(render(run.records, margins=run.margins()))
    assert shown in text and "ranks go by it" in text
    assert f"{shown} [" in model_card(recipe_of(best), story_of(run, best))
    assert table_rows(run.records, sort="expected")[0]["trial"] == best.number


def test_equals_by_expectation_are_told_apart_by_the_score_and_what_is_unknown_by_it_alone() -> None:
    complete = [replace(record, infeasible=None) for record in RECORDS if record.objective is not None]
    same = Expected(0.3, 0.1, 0.1, 0.5, 0.05)
    assert [r.number for r in ranked([replace(record, expected=same) for record in complete])] == [6, 2, 4, 1, 0]
    turned = [replace(record, expected=same.moved(-(record.objective or 0.0))) for record in complete]
    assert [r.number for r in ranked(turned)] == [0, 1, 2, 4, 6]
