"""What counts against `search.hours`, on made-up trials of one worker and of several."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.searches import settings

from mergesearch.evaluate.scores import TaskScore
from mergesearch.search.budget import Budget
from mergesearch.search.history import LATEST, History
from mergesearch.search.trials import HANDED_BACK, State, Trial

START = datetime(2026, 3, 1, 12)
SCORES = {"quiz": TaskScore(0.5, 0.1, 10, "acc")}


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def done(number: int, begun: float, ended: float, worker: str = "one", **more: Any) -> Trial:
    """A trial of ten documents that a worker was at from hour to hour."""
    kept: dict[str, Any] = {"state": State.COMPLETE, "strategy": "study", "scores": SCORES, "settled_at": at(ended)}
    kept |= {"taken": at(begun), "begun_at": at(begun), "ended_at": at(ended), "worker": worker, **more}
    return Trial(number, **kept)


def soup(number: int, begun: float, learned: float = 0.0, worker: str = "one", **more: Any) -> Trial:
    """A soup that a worker took at an hour, which has noted so many hours of learning."""
    kept: dict[str, Any] = {"learning_documents": 30, "learning_seconds": 3600 * learned, "worker": worker, **more}
    return Trial(number, State.RUNNING, "learned_soup", taken=at(begun), begun_at=at(begun), **kept)


def past(folder: Path, trials: list[Trial], hours: float | None = 4.0, **search: Any) -> History:
    config = settings(folder / "run", search={"trials": 1000, "hours": hours, **search}, report={"at_end": False})
    history = History(optuna.create_study(), config)
    history.trials = trials
    return history


def test_a_soup_ends_by_the_hours_of_the_run_and_not_by_the_sum_over_its_workers(tmp_path: Path) -> None:
    other = [done(n + 1, n / 2, (n + 1) / 2, worker="two") for n in range(7)]
    budget = Budget(past(tmp_path, [soup(0, 0.0), *other]))
    assert budget.history.hours == pytest.approx(3.5)
    assert budget.history.hours_with(0, at(3.6)) == pytest.approx(3.6)
    assert not budget.is_over(0, at(3.9)) and budget.is_over(0, at(4.0))
    assert not Budget(past(tmp_path, [soup(0, 0.0)], hours=None)).is_over(0, at(999))


def test_what_another_worker_has_learned_meanwhile_counts_and_its_silence_does_not(tmp_path: Path) -> None:
    """A worker that was killed in the evening leaves a trial that nobody is at until the morning."""
    history = past(tmp_path, [soup(0, 0.0, learned=2.0, worker="two"), soup(1, 14.0)])
    assert history.hours == 0.0 and history.hours_with(1, at(15)) == pytest.approx(3.0)
    assert history.hours_with(None, at(15)) == pytest.approx(2.0)


def test_hours_are_counted_to_when_a_trial_was_settled(tmp_path: Path) -> None:
    """The study is told of the parents once all of them are scored, which may be the next day."""
    parents = [done(0, 0.0, 0.1, ended_at=at(20)), done(1, 19.9, 20.0)]
    assert past(tmp_path, parents).hours == pytest.approx(0.2)
    scored = done(0, 0.0, 0.1, state=State.SCORED, ended_at=None)
    assert past(tmp_path, [scored]).hours == pytest.approx(0.1)
    failed = done(0, 0.0, 1.0, state=State.FAILED, scores={}, settled_at=None)
    assert past(tmp_path, [failed]).hours == pytest.approx(1.0)


def test_a_document_takes_no_longer_for_all_parents_being_told_together(tmp_path: Path) -> None:
    parents = [done(n, 0.1 * n, 0.1 * (n + 1), ended_at=at(0.5)) for n in range(5)]
    assert past(tmp_path, parents).hours_of_a_document == pytest.approx(0.01)
    two = [done(n, 0.1 * (n // 2), 0.1 * (n // 2 + 1), worker=f"w{n % 2}", ended_at=at(0.2)) for n in range(4)]
    assert past(tmp_path, two).hours_of_a_document == pytest.approx(0.01)  # of one worker
    assert Budget(past(tmp_path, parents, hours=4.0)).whole == 400


def test_the_whole_run_comes_to_what_all_its_workers_do_in_its_hours(tmp_path: Path) -> None:
    eight = [done(n, 0.1 * (n // 8), 0.1 * (n // 8 + 1), worker=f"w{n % 8}") for n in range(9)]
    under_way = [done(n, 0.1, 0.2, f"w{n % 8}", state=State.RUNNING, scores={}, settled_at=None) for n in range(9, 16)]
    history = past(tmp_path, [*eight, *under_way], hours=4.0)
    assert history.workers == 8 and Budget(history).whole == 8 * 400
    # what one worker may still do
    assert Budget(history).left == pytest.approx((4.0 - 0.2) / 0.01)
    waiting = Trial(16, State.WAITING)
    left = soup(17, 0.1, worker=HANDED_BACK)
    assert past(tmp_path, [*eight, *under_way, waiting, left]).workers == 8
    assert past(tmp_path, []).workers == past(tmp_path, [waiting]).workers == 1


def test_a_worker_that_is_started_again_is_no_second_worker(tmp_path: Path) -> None:
    alone = [done(n, 0.1 * n, 0.1 * (n + 1), worker=f"start {n}") for n in range(6)]
    copied = done(6, 0.2, 0.2, worker="start 2", same_as=1)
    assert past(tmp_path, [*alone, copied]).workers == 1
    # of a run that goes on with one of two
    two = [done(n, 0.1 * (n // 2), 0.1 * (n // 2 + 1), worker=f"w{n % 2}") for n in range(4)]
    on = [done(n, 0.1 * n, 0.1 * (n + 1)) for n in range(4, 4 + LATEST)]
    assert past(tmp_path, two + on[:4]).workers == 2 and past(tmp_path, two + on).workers == 1
