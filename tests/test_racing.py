"""Racing: the rule over simulated and recorded scores, and the study over stand-ins."""

from __future__ import annotations

import json
import socket
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.late import some
from support.races import SIZE, Live, quiz, start
from support.searches import Engine

from mergesearch.errors import CandidateError
from mergesearch.evaluate.blocks import split_blocks
from mergesearch.evaluate.scores import DocumentScores
from mergesearch.recipe import Recipe
from mergesearch.results.loading import load_run
from mergesearch.results.record import records
from mergesearch.results.table import render, table_rows
from mergesearch.search import trials
from mergesearch.search.racing import Lead, lead, quantile, spreads
from mergesearch.search.store import RunFolder
from scripts.bench.shared.replay import Matrix, race_all

RECORDED = Path(__file__).parent / "data" / "raced.npz"


# --- the rule ---


def test_on_all_documents_the_lead_is_the_difference_and_certain() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.random((2, 80)) < 0.5).astype(float)
    found = lead(quiz(ours), quiz(theirs), {"quiz": 2.0}, {"quiz": 80})
    assert found.value == pytest.approx(2 * (ours.mean() - theirs.mean())) and found.stderr == 0.0


def test_the_lead_compares_the_same_documents() -> None:
    theirs = np.arange(40.0)
    ids = [3, 7, 30]
    found = lead(quiz(theirs[ids] + 1.0, ids), quiz(theirs), {"quiz": 1.0}, {"quiz": 40})
    assert found.value == pytest.approx(1.0) and found.freedom == pytest.approx(2)


def test_no_difference_so_far_is_no_certainty() -> None:
    theirs = np.array([0.0, 1.0] * 20)
    found = lead(quiz(theirs[:10], list(range(10))), quiz(theirs), {"quiz": 1.0}, {"quiz": 40})
    assert found.value == 0.0 and found.stderr > 0.05


def test_one_document_decides_nothing() -> None:
    found = lead(quiz(np.zeros(1), [0]), quiz(np.ones(40)), {"quiz": 1.0}, {"quiz": 40})
    assert not found.upper(0.01) < 0


# Student's table, upper tail: degrees of freedom, then the quantile (Abramowitz and Stegun, table 26.10, and the NIST
# handbook of statistical methods, section 1.3.6.7.2)
STUDENT = {
    0.05: {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 10: 1.812, 30: 1.697, 100: 1.660},
    0.025: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 100: 1.984},
    0.01: {1: 31.821, 2: 6.965, 3: 4.541, 4: 3.747, 5: 3.365, 10: 2.764, 30: 2.457, 100: 2.364},
    0.005: {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 10: 3.169, 30: 2.750, 100: 2.626},
    0.001: {1: 318.309, 2: 22.327, 3: 10.215, 4: 7.173, 5: 5.893, 10: 4.144, 30: 3.385, 100: 3.174},
}


@pytest.mark.parametrize("error", STUDENT)
def test_the_quantile_is_the_one_of_students_table(error: float) -> None:
    for freedom, wanted in STUDENT[error].items():
        assert quantile(error, freedom) == pytest.approx(wanted, abs=6e-4)


def test_the_quantile_has_a_closed_form_at_one_and_two_degrees() -> None:
    """Cauchy's at 1, and (1 - 2 p) / sqrt(2 p (1 - p)) at 2: checked where racing's default error is."""
    assert quantile(0.002, 1) == pytest.approx(1 / np.tan(np.pi * 0.002)) == pytest.approx(159.15, abs=0.01)
    assert quantile(0.002, 2) == pytest.approx((1 - 2 * 0.002) / np.sqrt(2 * 0.002 * 0.998))


def test_the_quantile_of_degrees_between_whole_numbers_lies_between_theirs() -> None:
    values = [quantile(0.002, freedom) for freedom in (1, 1.25, 1.5, 2, 2.7, 4, 7.5, 64, 1e6)]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert isinstance(values[0], float) and values[-1] == pytest.approx(2.8782, abs=1e-4)


@pytest.mark.parametrize("freedom", [0, 0.0, 0.99])
def test_without_a_degree_of_freedom_nothing_is_certain(freedom: float) -> None:
    assert quantile(0.01, freedom) == np.inf


def test_twenty_standard_errors_behind_is_no_certainty_at_one_degree_of_freedom() -> None:
    assert not Lead(-0.5, 0.025, 1.0).upper(0.002) < 0 and Lead(-0.5, 0.025, 4.0).upper(0.002) < 0


def _raced(skills: np.ndarray, differ: float) -> tuple[int, int, int]:
    """(stopped, wrongly stopped, contenders) of candidates with these skills against one of skill 0.6."""
    stopped, wrong, contenders = 0, 0, 0
    parts = split_blocks({"quiz": list(range(320))}, 12, seed=0)
    for seed, skill in enumerate(skills):
        rng = np.random.default_rng(seed)
        theirs = (rng.random(320) < 0.6).astype(float)
        ours = np.where(rng.random(320) < differ, (rng.random(320) < skill).astype(float), theirs)
        contenders += ours.mean() > theirs.mean()
        if _stopped_after(ours, theirs, parts, 0.01) is not None:
            stopped += 1
            wrong += ours.mean() > theirs.mean()
    return stopped, wrong, contenders


@pytest.mark.parametrize("differ", [0.1, 0.5])
def test_of_those_stopped_hardly_any_would_have_won(differ: float) -> None:
    stopped, wrong, contenders = _raced(np.linspace(0.2, 0.9, 2000), differ)
    assert stopped > 500 and contenders > 500 and wrong / stopped <= 0.01


def test_even_among_equals_most_of_those_that_would_have_won_stay() -> None:
    """The hardest case, for which the predicted chance is too small: every candidate is as good as the best."""
    _, wrong, contenders = _raced(np.full(800, 0.6), 0.3)
    assert wrong / contenders <= 0.03


def test_the_spread_is_what_documents_move_the_objective_by() -> None:
    rng = np.random.default_rng(0)
    easy = [{"quiz": DocumentScores(list(range(400)), values, "mean")} for values in rng.normal(size=(3, 400))]
    bits = [
        DocumentScores(list(range(400)), np.stack([v, np.ones(400)], 1), "bits_per_byte")
        for v in rng.normal(size=(3, 400))
    ]
    both = [{**quiz, "bits": each} for quiz, each in zip(easy, bits, strict=True)]
    found = spreads(both, {"quiz": 0.5, "bits": -0.1})
    assert found["quiz"] == pytest.approx(0.5 * np.sqrt(2), rel=0.1)
    assert found["bits"] == pytest.approx(0.1 * np.sqrt(2) / np.log(2), rel=0.1)
    shifted = [{"quiz": DocumentScores(list(range(4)), np.arange(4.0) + n, "mean")} for n in range(3)]
    assert spreads(shifted, {"quiz": 1.0})["quiz"] == pytest.approx(0)


def _stopped_after(ours: np.ndarray, theirs: np.ndarray, parts: list[Any], error: float) -> int | None:
    for number in range(1, len(parts)):
        ids = sorted(i for part in parts[:number] for i in part["quiz"])
        found = lead(quiz(ours[ids], ids), quiz(theirs), {"quiz": 1.0}, {"quiz": len(ours)})
        if found.upper(error) < 0:
            return number
    return None


def test_a_candidate_far_behind_is_stopped_at_once() -> None:
    rng = np.random.default_rng(0)
    theirs = (rng.random(320) < 0.8).astype(float)
    ours = (rng.random(320) < 0.2).astype(float)
    parts = split_blocks({"quiz": list(range(320))}, 8, seed=0)
    assert _stopped_after(ours, theirs, parts, 0.01) <= 2


@pytest.mark.skipif(not RECORDED.is_file(), reason="no recorded matrix")
def test_over_recorded_scores_the_winner_stays_and_documents_are_saved() -> None:
    matrix = Matrix.read(RECORDED)
    found = [race_all(matrix, blocks=16, error=0.002, seed=seed) for seed in range(12)]
    assert sum(r.wrong for r in found) <= 0.01 * sum(r.stopped for r in found)
    assert sum(r.evaluations for r in found) < sum(r.full for r in found)
    assert sum(r.same_winner for r in found) >= 11


# --- the study ---


def rows(folder: Path) -> list[tuple[Any, ...]]:
    return [(r.number, r.recipe_id, r.state, r.objective, r.stopped) for r in load_run(folder).records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Live]:
    folder = tmp_path_factory.mktemp("raced") / "run"
    live = Live(Engine())
    start(folder, live).run()
    return folder, live


def test_hopeless_candidates_are_pruned_and_say_after_how_many_documents(whole: tuple[Path, Live]) -> None:
    folder, live = whole
    found = load_run(folder).records
    pruned = [record for record in found if record.state == "pruned"]
    assert len(found) == 16 and pruned and all(r.state == "complete" for r in found[:4])
    for record in pruned:
        assert record.objective is None and record.scores == {} and record.partial["quiz"].documents < SIZE
        assert record.stopped.startswith(f"after {record.partial['quiz'].documents} of {SIZE} documents: -0.")
    assert len(live.asked) < 16 * SIZE


def test_the_winner_is_the_one_that_scoring_everything_finds(whole: tuple[Path, Live], tmp_path: Path) -> None:
    found = load_run(whole[0]).records
    best = max((r for r in found if r.objective is not None), key=lambda r: r.objective)
    for record in found:
        if record.state == "pruned":
            engine = Engine()
            engine.load(Recipe.from_data(dict(record.recipe), "test"))
            assert Live(engine).score().tasks["quiz"].value <= best.objective


def test_the_table_shows_them(whole: tuple[Path, Live]) -> None:
    found = load_run(whole[0]).records
    row = next(row for row in table_rows(found) if row["state"] == "pruned")
    assert row["rank"] is None and row["quiz"] is None and row["error"].startswith("after ")
    assert "pruned: after " in render(found, "md")


@pytest.mark.parametrize(
    "at",
    some(
        [0, 2 * SIZE + 1, 4 * SIZE, 4 * SIZE + 30, 4 * SIZE + 130, 4 * SIZE + 250],
        now=[2 * SIZE + 1, 4 * SIZE, 4 * SIZE + 130],
    ),
)
def test_killed_between_blocks_it_goes_on_from_there(tmp_path: Path, whole: tuple[Path, Live], at: int) -> None:
    first = Live(Engine())
    first.stop_at = at
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", first).run()
    second = Live(Engine())
    start(tmp_path / "run", second).run()
    assert rows(tmp_path / "run") == rows(whole[0])
    # no block was scored twice, none lost
    assert sorted(first.asked + second.asked) == sorted(whole[1].asked)


def test_a_recipe_that_was_scored_is_not_scored_again(tmp_path: Path) -> None:
    live = Live(Engine())
    fixed = {"methods": ["linear"], "weight": [0.5, 0.5]}
    search = start(tmp_path / "run", live, trials=3, space=fixed, racing=None)
    search.run()
    found = records(search.history())
    assert len({record.recipe_id for record in found[4:]}) == 1
    assert {r.objective for r in found[4:]} == {found[4].objective} and found[5].seconds == 0.0
    assert len(live.engine.loaded) == len({record.recipe_id for record in found})
    assert search.folder.documents(5).read_bytes() == search.folder.documents(4).read_bytes()


def test_a_pruned_recipe_goes_on_from_its_blocks(tmp_path: Path, whole: tuple[Path, Live]) -> None:
    found = next(record for record in load_run(whole[0]).records if record.state == "pruned")
    live = Live(Engine())
    search = start(tmp_path / "run", live, trials=0)
    search.run()
    for _ in range(2):
        trials.enqueue(search.study, strategy="random", recipe_data=found.recipe, recipe_id=found.recipe_id)
        search.run()
    first, second = records(search.history())[4:]
    assert (first.state, first.stopped) == (second.state, second.stopped) and second.seconds == 0.0
    assert len(set(live.asked)) == len(live.asked)


def test_nothing_races_before_the_parents_have_fixed_the_objective(tmp_path: Path) -> None:
    """Another worker may still be at a parent when this one comes to the published defaults."""
    search = start(tmp_path / "run")
    trials.enqueue(search.study, name="ties 0.2", strategy="baselines")
    number = search.study.ask().number
    assert not search._may_race(search.history().trials[number], search.history())
    search.run()
    assert search._may_race(search.history().trials[number], search.history())


def test_without_racing_nothing_is_pruned(tmp_path: Path) -> None:
    live = Live(Engine())
    start(tmp_path / "run", live, trials=4, racing=None).run()
    assert {row[2] for row in rows(tmp_path / "run")} == {"complete"}


def test_samplers_see_how_far_a_pruned_trial_got(whole: tuple[Path, Live]) -> None:
    search = start(whole[0])
    pruned = [trial for trial in search.study.trials if trial.state.name == "PRUNED"]
    for trial in pruned:
        ((step, value),) = trial.intermediate_values.items()
        assert 1 <= step <= 6 and value == trials.read(trial).partial["quiz"].value


def test_a_block_file_holds_its_answers(whole: tuple[Path, Live]) -> None:
    found = next(record for record in load_run(whole[0]).records if record.state == "pruned")
    files = sorted(RunFolder(whole[0]).blocks(found.recipe_id).glob("*.json"))
    answers = [answer for file in files for answer in json.loads(file.read_text())]
    assert len(answers) == found.partial["quiz"].documents


DAMAGES = {"empty": b"", "other": b"no archive at all", "half": None}
WHOSE = ("best", "base", "another")


@pytest.mark.parametrize("of", some(product(WHOSE, DAMAGES), now=set(zip(WHOSE, DAMAGES, strict=True))), ids="-".join)
def test_damaged_documents_fail_no_candidate(tmp_path: Path, of: tuple[str, str]) -> None:
    whose, damage = of[0], DAMAGES[of[1]]
    whole = start(tmp_path / "whole")
    whole.run()
    start(tmp_path / "run", trials=5).run()
    history, before = whole.history(), start(tmp_path / "run").history()
    named = {"best": before.complete()[0].number, "base": 0, "another": 3}
    file = RunFolder(tmp_path / "run").documents(named[whose])
    contents = file.read_bytes()
    file.write_bytes(contents[: len(contents) // 2] if damage is None else damage)
    said: list[str] = []
    search = start(tmp_path / "run", say=said.append)
    search.run()
    after = search.history()
    assert not [trial.error for trial in after.trials if trial.error]
    about = [text for text in said if str(file) in text]
    assert len(about) == 1 and f"trial {named[whose]}" in about[0], said
    if whose == "best":
        # without it nobody can be raced as before
        assert "is scored again" in about[0] and file.read_bytes() == contents
        assert [(t.recipe_id, t.state, t.blocks) for t in after.trials] == [
            (t.recipe_id, t.state, t.blocks) for t in history.trials
        ]
    else:
        assert "no race predicts from" in about[0] and len(after.trials) == len(history.trials)


def test_a_parent_whose_documents_are_damaged_is_scored_again_for_the_blocks(tmp_path: Path) -> None:
    start(tmp_path / "run", trials=0).run()
    file = RunFolder(tmp_path / "run").documents(1)
    contents = file.read_bytes()
    file.write_bytes(contents[:100])
    said: list[str] = []
    start(tmp_path / "run", say=said.append).run()
    assert "trial 1 is scored again" in said[0] and file.read_bytes() == contents


def test_a_damaged_file_whose_trial_cannot_be_scored_again_is_left_out(tmp_path: Path) -> None:
    start(tmp_path / "run", trials=5).run()
    search = start(tmp_path / "run")
    best = search.history().complete()[0]
    RunFolder(tmp_path / "run").documents(best.number).write_bytes(b"")
    said: list[str] = []
    engine = Engine(lambda recipe: CandidateError("out of memory") if recipe.id == best.recipe_id else None)
    again = start(tmp_path / "run", Live(engine), say=said.append)
    again.run()
    assert any(f"trial {best.number} is left out of races: it could not be scored again" in text for text in said)
    assert not [trial.error for trial in again.history().trials if trial.error]


def test_blocks_and_soups_that_a_kill_left_behind_are_cleared_at_the_next_start(tmp_path: Path) -> None:
    search = start(tmp_path / "run", trials=4)
    search.run()
    done = next(t for t in search.history().trials if t.state is trials.State.COMPLETE and not t.name)
    (search.folder.blocks(done.recipe_id or "") / "000.json").parent.mkdir(parents=True)
    under_way = search.folder.blocks("of a trial that is at work")
    under_way.mkdir(parents=True)
    half = search.folder.learning(4).parent / f".00004.partial-999999999-0a1b2c3d@{socket.gethostname()}"
    half.parent.mkdir(exist_ok=True)
    half.touch()
    start(tmp_path / "run", trials=4).run()
    assert not search.folder.blocks(done.recipe_id or "").exists() and not half.exists() and under_way.exists()


def test_a_damaged_file_of_blocks_is_asked_again(tmp_path: Path) -> None:
    live = Live(Engine())
    live.stop_at = 5 * SIZE + 60
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", live).run()
    files = list((tmp_path / "run" / "scores" / "blocks").glob("*/*.json"))
    for file in files:
        file.write_text('{"not": "answers"}')
    search = start(tmp_path / "run")
    search.run()
    assert files and not [trial.error for trial in search.history().trials if trial.error]
