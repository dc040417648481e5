"""What a run will still take, against what is counted by hand on made-up trials."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch.evaluate.scores import TaskScore
from mergesearch.search.costs import duration, words_of
from mergesearch.search.estimate import Estimate, Part, estimate
from mergesearch.search.history import History, settled_at
from mergesearch.search.speed import LEARNING, Probe
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State, Trial
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace
from scripts.bench.estimate import replay

START = datetime(2026, 3, 1, 12)
DOCUMENTS = {"quiz": 10, "bits": 10}
# merging 1 s, scoring 20 documents of 0.5 and 0.1 s: 6 s
PROBE = Probe(DOCUMENTS, {"quiz": 0.5, "bits": 0.1}, merge=1.0, learning=0.25, export=3.0)


def score(documents: int = 10) -> dict[str, TaskScore]:
    return {task: TaskScore(0.5, 0.1, documents, "acc") for task in DOCUMENTS}


def done(number: int, name: str | None = None, seconds: float = 6.0, strategy: str = "study", **more: Any) -> Trial:
    taken = START + timedelta(seconds=7 * number)
    kept: dict[str, Any] = {"key": {"stage": "refine"}, "scores": score(), "recipe_data": {}, "worker": "one", **more}
    return Trial(
        number,
        State.COMPLETE,
        "baselines" if name else strategy,
        name=name,
        merge_seconds=1.0,
        score_seconds=seconds,
        taken=taken,
        begun_at=taken,
        ended_at=taken + timedelta(seconds=7),
        **kept,
    )


def past(tmp_path: Path, trials: list[Trial], **changes: Any) -> History:
    """A history of made-up trials."""
    config = settings(tmp_path / "run", **changes)
    search = Search(config, RunFolder.prepare(config), SearchSpace(config, INFOS, 2), Engine(), Scorer(Engine()))
    history = History(search.study, config)
    history.trials = trials
    return history


def of(history: History, **more: Any) -> Estimate:
    found = estimate(history.config, history, PROBE, **more)
    assert found is not None
    return found


PARENTS = [done(0, "base"), done(1, "a"), done(2, "b"), done(3, "average")]


def test_nothing_is_known_without_documents(tmp_path: Path) -> None:
    assert estimate(settings(tmp_path)) is None
    untimed = estimate(settings(tmp_path), probe=Probe(DOCUMENTS))
    assert untimed is not None and untimed.seconds is None and untimed.documents == 18 * 20


def test_before_a_run_the_probe_says_how_long(tmp_path: Path) -> None:
    found = estimate(settings(tmp_path), probe=PROBE)
    assert found is not None
    # base, a, b and the average, then 14 proposals, each 7 s
    assert [(part.strategy, part.trials) for part in found.parts] == [("baselines", 4), ("study", 14)]
    assert found.trials == 18 and found.documents == 360
    assert found.searching == pytest.approx(18 * 7.0) and found.seconds == pytest.approx(18 * 7.0 + 3.0)
    assert words_of(found) == "about 2 min 10 s: 4 baselines 28 s, 14 proposals 1 min 40 s, writing the winner 3 s"


def test_trials_correct_the_probe(tmp_path: Path) -> None:
    slow = [replace(trial, score_seconds=12.0) for trial in PARENTS[:2]]
    apart = [replace(t, taken=START + timedelta(seconds=14 * t.number)) for t in slow]  # a second beside each
    found = of(past(tmp_path, apart))
    assert found.searching == pytest.approx(16 * (1 + 12 + 1)) and found.trials == 16


def test_soups_take_what_learning_took(tmp_path: Path) -> None:
    search = {"strategy": ["greedy_soup", "learned_soup", "study"], "trials": 5, "defaults": False}
    config = settings(tmp_path, search=search)
    found = estimate(config, probe=PROBE)
    assert found is not None
    parts = {part.strategy: part for part in found.parts}
    # 100 steps of 4 documents of 2 tasks; 11 looks at 2 documents (a quarter of 10, rounded) of each; by cross-entropy
    # 3 parents on as many
    usual = [3 * 100 * 4 * 2 + 11 * 4, 3 * 100 * 4 * 2 + 11 * 4 + 3 * 4]
    assert (parts["greedy_soup"].trials, parts["learned_soup"].trials, parts["study"].trials) == (1, 2, 2)
    assert parts["learned_soup"].learning == sum(usual)
    assert parts["learned_soup"].seconds == pytest.approx(sum(usual) * 0.25 + 2 * 7)
    unmeasured = estimate(config, probe=replace(PROBE, learning=None))
    assert unmeasured is not None
    by_factor = next(part for part in unmeasured.parts if part.strategy == "learned_soup")
    assert by_factor.seconds == pytest.approx(sum(usual) * LEARNING * 6 / 20 + 2 * 7)
    # the first soup took half of what is usual, at 0.1 s: so will the second
    first = done(
        5,
        strategy="learned_soup",
        key={"per": "tensor", "loss": "expected", "gradients": True},
        learning_documents=usual[0] // 2,
        learning_seconds=0.1 * (usual[0] // 2),
    )
    greedy = done(4, strategy="greedy_soup", key={"ingredients": ["a", "b"]})
    rest = of(past(tmp_path, [*PARENTS, greedy, first], search=search))
    second = next(part for part in rest.parts if part.strategy == "learned_soup")
    assert second.learning == pytest.approx(usual[1] / 2, abs=2)
    assert second.seconds == pytest.approx(0.1 * second.learning + 7, abs=1.0)


def test_the_first_budget_to_end_ends_it(tmp_path: Path) -> None:
    proposals = [*PARENTS, done(4), done(5)]
    assert of(past(tmp_path / "trials", proposals)).trials == 12
    by_documents = of(past(tmp_path / "documents", proposals, search={"documents": 170}))
    assert (by_documents.trials, by_documents.documents) == (3, 60)  # 120 are spent; the last goes beyond
    hours = (6 * 7 + 4 * 7 - 1) / 3600
    assert of(past(tmp_path / "hours", proposals, search={"hours": hours})).trials == 4
    over = of(past(tmp_path / "over", proposals, search={"trials": 2}))
    assert over.parts == () and over.seconds == 0.0


def test_later_strategies_keep_their_part_and_controls_come_on_top(tmp_path: Path) -> None:
    search = {"strategy": ["study", "greedy_soup"], "trials": 6, "random_control": True}
    found = of(past(tmp_path, PARENTS, search=search))
    parts = {part.strategy: part.trials for part in found.parts}
    assert parts == {"study": 5, "greedy_soup": 1, "random_control": 6}


def test_of_races_the_share_is_learned(tmp_path: Path) -> None:
    racing = {"racing": {"blocks": 4}}
    fresh = of(past(tmp_path / "fresh", PARENTS, **racing))
    assert fresh.documents == pytest.approx(14 * 20 * 0.5)
    stopped = [
        replace(
            done(4 + n, seconds=1.5),
            taken=START + timedelta(seconds=28 + 2.5 * n),
            state=State.PRUNED,
            scores={},
            partial=score(2),
            blocks=1,
            stopped="behind",
        )
        for n in range(8)
    ]
    found = of(past(tmp_path / "run", [*PARENTS, *stopped], **racing))
    share = (2 * 0.5 + 8 * 0.2) / 10  # two guesses of a half, and eight that took a fifth
    assert found.trials == 6 and found.documents == pytest.approx(6 * 20 * share, abs=1)
    seconds = (2 * 0.75 + 8 * 0.25) / 10
    assert found.searching == pytest.approx(6 * (1 + 6 * seconds), rel=0.05)


def test_several_workers_share_the_work(tmp_path: Path) -> None:
    running = [Trial(n, State.RUNNING, "study", key={"stage": "refine"}, worker=f"w{n}", taken=START) for n in (4, 5)]
    alone = of(past(tmp_path / "alone", [*PARENTS, running[0]]), now=START)
    both = of(past(tmp_path / "both", [*PARENTS, *running]), now=START)
    assert alone.searching == pytest.approx(14 * 7.0) and both.searching == pytest.approx(14 * 7.0 / 2)
    aged = of(past(tmp_path / "aged", [*PARENTS, running[0]]), now=START + timedelta(seconds=5))
    assert aged.searching == pytest.approx(14 * 7.0 - 5)
    late = of(past(tmp_path / "late", [*PARENTS, running[0]]), now=START + timedelta(seconds=500))
    assert late.searching == pytest.approx(13 * 7.0)


def test_more_to_do_takes_longer_and_less_is_left_as_it_goes(tmp_path: Path) -> None:
    few, many = (estimate(settings(tmp_path, search={"trials": n}), probe=PROBE) for n in (5, 50))
    assert few is not None and many is not None and (few.seconds or 0) < (many.seconds or 0)
    config = settings(tmp_path / "run", search={"strategy": ["greedy_soup", "study"], "trials": 6})
    engine = Engine()
    search = Search(config, RunFolder.prepare(config), SearchSpace(config, INFOS, 2), engine, Scorer(engine))
    search.run()
    history = search.history()
    noted = [(trial.begun_at, trial.settled_at, trial.ended_at) for trial in history.trials]
    assert all(begun and settled and ended and begun <= settled <= ended for begun, settled, ended in noted)
    assert noted[0][1] < noted[1][1] < noted[0][2]  # type: ignore[operator]  # the base ends once all parents are scored
    moments = sorted(moment for trial in history.trials if (moment := settled_at(trial)) is not None)
    rests = [estimate(config, history.at(moment), now=moment) for moment in moments]
    replayed = replay(history, [1, 3, len(moments) - 1, len(moments)])
    assert [each.trials for each in replayed] == [1, 3, len(moments) - 1]
    assert [each.estimated for each in replayed] == [rest.searching for rest in (rests[0], rests[2], rests[-2]) if rest]
    assert replayed[0].taken == (moments[-1] - moments[0]).total_seconds() > replayed[1].taken
    assert all(each.factor == max(each.ratio, 1 / each.ratio) >= 1 for each in replayed)
    trials = [rest.trials for rest in rests if rest is not None]
    assert trials == list(range(len(moments) - 1, -1, -1))
    assert rests[-1] is not None and rests[-1].parts == () and rests[-1].seconds == 0.0
    assert history.at(moments[2]).objective is None and history.at(moments[-1]).objective is not None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (131, "2 min 10 s"), (598, "10 min"), (1800, "30 min"),
     (3600 * 3 + 300, "3 h 5 min"), (3600 * 23, "23 h"), (86400 * 2 + 3600 * 4, "2 days 4 h")],
)  # fmt: skip
def test_durations_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_estimate_in_words() -> None:
    parts = (Part("baselines", 1, 20, 0, 7.0), Part("learned_soup", 0, 30, 10, 12.0))
    assert (
        words_of(Estimate(parts, 19.0, 2.0))
        == "about 21 s: 1 baseline 7 s, a learned soup 12 s, writing the winner 2 s"
    )
    fixed = Estimate(parts, 19.0, exporting=3.0, loading=6.0)
    assert words_of(fixed).startswith("about 28 s: ") and words_of(fixed).endswith(
        ", loading 6 s, writing the winner 3 s"
    )
    untimed = Estimate((Part("study", 2, 40, 0, None),), None)
    assert words_of(untimed) == "about 40 document evaluations: 2 proposals"


@pytest.mark.parametrize("ends", ["auto", "budget"])
def test_it_says_what_would_leave_the_study_out(tmp_path: Path, ends: str) -> None:
    found = estimate(settings(tmp_path, search={"strategy": "auto", "trials": 5, "study_ends": ends}), probe=PROBE)
    assert found is not None
    assert ("unless a learned soup is ahead of all else by then" in words_of(found)) is (ends == "auto")
