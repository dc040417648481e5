"""What counts against `search.hours`, on made-up trials of one worker and of several."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from support.searches import settings, start

from mergesearch.evaluate.scores import TaskScore
from mergesearch.search import trials
from mergesearch.search.budget import Budget
from mergesearch.search.history import LATEST, History, spans
from mergesearch.search.trials import HANDED_BACK, Kind, State, Trial

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


def past(folder: Path, made: list[Trial], hours: float | None = 4.0, **search: Any) -> History:
    config = settings(folder / "run", search={"trials": 1000, "hours": hours, **search}, report={"at_end": False})
    history = History(optuna.create_study(), config)
    history.trials = made
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


def test_what_was_learned_before_an_interruption_counts(tmp_path: Path) -> None:
    """50 minutes into a soup somebody interrupts it, and goes on the next day."""
    before = soup(0, 0.0, learned=0.8, worker=HANDED_BACK)
    assert past(tmp_path, [before]).hours == pytest.approx(0.8)
    again = replace(soup(0, 20.0, learned=0.9), begun_at=START, earlier=tuple(spans(before)))
    history = past(tmp_path, [again], hours=2.0)
    assert history.hours == pytest.approx(0.8) and history.hours_with(None) == pytest.approx(0.9)
    budget = Budget(history)
    assert not budget.is_over(0, at(21.1)) and budget.is_over(0, at(21.25))
    # another worker, whose time counts once, was at work while it was learned at first
    both = past(tmp_path, [again, done(1, 0.5, 1.0, worker="two")], hours=2.0)
    assert both.hours == pytest.approx(1.0) and both.hours_with(0, at(21)) == pytest.approx(2.0)
    ended = done(0, 20.0, 21.0, learning_documents=90, learning_seconds=1.7 * 3600, earlier=again.earlier)
    assert past(tmp_path, [ended]).hours == pytest.approx(1.8)
    assert past(tmp_path, [ended]).hours_of_a_document == pytest.approx(1.8 / 100)
    replayed = past(tmp_path, [again])
    assert replayed.at(at(0.5)).trials[0].earlier == () and replayed.at(at(1)).trials[0].earlier == again.earlier


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("killed", [None, "earlier"])
def test_whoever_takes_a_trial_up_notes_how_long_another_was_at_it(
    tmp_path: Path, killed: str | None, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = start(tmp_path / "run", search={"trials": 1})
    trials.enqueue(search.study, strategy="study", kind=Kind.SAMPLED, key={"stage": "study", "sampler": "tpe"})
    handle = search.study.ask()
    trials.write(handle, worker=HANDED_BACK, taken=START, learning_seconds=3000.0)
    if settled:
        trials.write(handle, settled_at=START + timedelta(seconds=3000), scores=SCORES | {"bits": SCORES["quiz"]})
    write = optuna.Trial.set_user_attr

    def dies(self: optuna.Trial, name: str, value: Any) -> None:
        write(self, name, value)
        if name == killed and not died:
            died.append(name)
            raise KeyboardInterrupt

    died: list[str] = []
    monkeypatch.setattr(optuna.Trial, "set_user_attr", dies)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            search.run()
    search.run()
    trial = trials.at(search.study, 0)
    assert trial.earlier == ((START, START + timedelta(seconds=3000)),)
    assert trial.taken is not None and trial.taken > START
    assert search.history().hours == pytest.approx(3000 / 3600, abs=0.01)
