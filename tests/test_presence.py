"""Who is at work on a run, and how the others tell: locks on one host, signs of life between hosts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from support.searches import Engine, Scorer, start

from mergesearch.errors import CandidateError, UserError
from mergesearch.search import store, trials
from mergesearch.search.presence import APART, BEAT, BRIEFLY, SILENT, Presence, Sign, check_disk, host_of, signs
from mergesearch.search.trials import HANDED_BACK, Kind, State
from mergesearch.search.worker import MOST_FAILURES, MOST_LOST, Search, SearchFailed

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
ELSEWHERE = "far-away-12-0a1b2c3d"


class Clock:
    """Seconds that pass when they are told to; both of the host's clocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)


def beats(search: Search, beat: int, at: datetime, **changes: Any) -> None:
    sign = Sign(ELSEWHERE, "far-away", 12, "cuda:0", beat, at, NOW, **changes)
    store.note(search.study, f"worker:{ELSEWHERE}", sign.to_data())


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return start(tmp_path / "run")


def presence(search: Search, clock: Clock | None = None, said: list[str] | None = None) -> Presence:
    clock = clock or Clock()
    say = (said if said is not None else []).append
    return Presence(search.folder, search.study, device="cpu", say=say, clock=clock, now=clock.now)


def test_on_one_host_a_worker_is_gone_at_once(search: Search) -> None:
    with presence(search) as mine, presence(search) as other:
        assert not mine.is_gone(other.id) and not mine.is_gone(None)
        gone = other.id
    with presence(search) as mine:
        assert mine.is_gone(gone) and mine.is_gone(None)
    assert list(search.folder.workers.glob("*.lock")) == []


def test_a_host_of_the_same_name_may_have_a_folder_of_its_own(search: Search, tmp_path: Path) -> None:
    clock = Clock()
    elsewhere = store.RunFolder(tmp_path / "elsewhere")
    elsewhere.workers.mkdir(parents=True)
    with presence(search) as other:
        mine = Presence(elsewhere, search.study, clock=clock, now=clock.now)
        assert not mine.is_gone(other.id)
        clock.seconds = SILENT + 1
        assert mine.is_gone(other.id)


def test_what_one_worker_finds_of_a_killed_one_all_of_its_host_know(search: Search) -> None:
    killed = presence(search).__enter__()
    killed._over.set()
    killed._lock.release()  # as the system does
    first, second = presence(search), presence(search)
    assert first.is_gone(killed.id) and not (search.folder.workers / f"{killed.id}.lock").exists()
    assert second.is_gone(killed.id) and signs(search.study)[killed.id].ended


def test_every_worker_leaves_signs(search: Search) -> None:
    with presence(search) as mine:
        (sign,) = signs(search.study).values()
        assert (sign.worker, sign.beat, sign.at, sign.ended) == (mine.id, 1, NOW, False)
        assert host_of(mine.id) == sign.host
    (sign,) = signs(search.study).values()
    assert sign.ended and sign.beat == 2
    with pytest.raises(KeyboardInterrupt), presence(search) as stopped:
        raise KeyboardInterrupt
    assert (search.folder.workers / f"{stopped.id}.lock").is_file() and signs(search.study)[stopped.id].ended


def test_of_another_host_is_gone_whose_number_stands_still(search: Search) -> None:
    clock, said = Clock(), []
    beats(search, 1, NOW)
    mine = presence(search, clock, said)
    assert not mine.is_gone(ELSEWHERE)
    clock.seconds = SILENT - 1
    assert not mine.is_gone(ELSEWHERE)
    beats(search, 2, clock.now() - timedelta(seconds=BEAT))
    clock.seconds += 2  # it has moved, so the time begins anew
    assert not mine.is_gone(ELSEWHERE)
    clock.seconds += SILENT + 1
    assert mine.is_gone(ELSEWHERE) and said == []


@pytest.mark.parametrize("waits", [False, True], ids=["it fails", "it does not answer"])
def test_nobody_is_gone_for_what_the_storage_did_not_take(
    search: Search, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    clock = Clock()

    def away(study: Any, key: str, value: Any) -> None:
        clock.seconds += SILENT + 1
        if not waits:
            raise OSError("the server is away")

    beats(search, 1, NOW)
    mine = presence(search, clock)
    assert not mine.is_gone(ELSEWHERE)
    with monkeypatch.context() as storage:
        storage.setattr(store, "note_at_once", away)
        mine._try_to_beat()
    clock.seconds += BEAT
    assert not mine.is_gone(ELSEWHERE)
    clock.seconds += SILENT
    assert mine.is_gone(ELSEWHERE)


def test_a_lock_says_nothing_of_another_host_that_gives_signs(search: Search) -> None:
    (search.folder.workers / f"{ELSEWHERE}.lock").touch()
    assert presence(search).is_gone(ELSEWHERE)  # of a version without signs
    (search.folder.workers / f"{ELSEWHERE}.lock").touch()
    beats(search, 1, NOW)
    assert not presence(search).is_gone(ELSEWHERE)
    beats(search, 2, NOW, ended=True)
    assert presence(search).is_gone(ELSEWHERE)


@pytest.mark.parametrize("ahead", [-7200.0, 7200.0])
def test_a_clock_that_is_off_is_noticed_and_costs_no_trial(search: Search, ahead: float) -> None:
    clock, said = Clock(), []
    mine = presence(search, clock, said)
    for beat in range(1, 20):  # alive for ten minutes, looked at in between
        beats(search, beat, clock.now() + timedelta(seconds=ahead))
        assert not mine.is_gone(ELSEWHERE)
        clock.seconds += BEAT
        assert not mine.is_gone(ELSEWHERE)
    assert len(said) == 1 and "the clock of far-away is 72" in said[0] and abs(ahead) > APART
    assert (" ahead of " if ahead > 0 else " behind ") in said[0]


def test_who_was_long_silent_when_it_was_first_seen_is_gone_sooner(search: Search) -> None:
    clock = Clock()
    beats(search, 7, NOW - timedelta(hours=3))
    mine = presence(search, clock)
    assert not mine.is_gone(ELSEWHERE)
    clock.seconds = BRIEFLY + 1
    assert mine.is_gone(ELSEWHERE)


def test_sqlite_on_a_network_disk_is_for_one_host(search: Search, tmp_path: Path) -> None:
    mounts, said = tmp_path / "mounts", []
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/runs {tmp_path} nfs4 rw 0 0\n")
    check_disk(search.config, search.folder, None, said.append, mounts)
    assert len(said) == 1 and "is SQLite on a network disk (nfs4), which is safe for one host alone" in said[0]
    beats(search, 1, datetime.now(timezone.utc))
    with pytest.raises(
        UserError, match=r"far-away is at work on it too.*set storage to a database that all hosts reach"
    ):
        check_disk(search.config, search.folder, search.study, said.append, mounts)
    beats(search, 2, datetime.now(timezone.utc), ended=True)
    check_disk(search.config, search.folder, search.study, said.append, mounts)
    elsewhere = search.config.model_copy(update={"storage": "postgresql://me@host/runs"})
    check_disk(elsewhere, search.folder, search.study, said.append, mounts)
    assert len(said) == 3 and "locks may not hold between hosts" in said[-1]
    check_disk(search.config, search.folder, search.study, said.append, tmp_path / "none")
    assert len(said) == 3


# --- what becomes of its trial ---


class Interrupted(Engine):
    """Raises at one call, or does something there."""

    def __init__(self, at: int, act: Any):
        super().__init__()
        self.at, self.act = at, act

    def load(self, recipe: Any) -> float:
        if len(self.loaded) == self.at:
            self.at = -1
            self.act()
        return super().load(recipe)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_trial_that_is_interrupted_is_handed_back(tmp_path: Path) -> None:
    search = start(tmp_path / "run", Interrupted(6, _interrupt))
    with pytest.raises(KeyboardInterrupt):
        search.run()
    (left,) = [t for t in search.history().trials if t.state is State.RUNNING]
    assert left.worker == HANDED_BACK and left.lost == 0
    start(tmp_path / "run").run()
    again = search.history().trials[left.number]
    assert again.state is State.COMPLETE and again.lost == 0


def test_what_another_worker_took_meanwhile_is_dropped(tmp_path: Path) -> None:
    said: list[str] = []

    def taken() -> None:
        handle = trials.handle(search.study, 6)
        trials.write(handle, worker=ELSEWHERE)
        search.folder.documents(6).write_text("the other's")
        beats(search, 1, datetime.now(timezone.utc))

    search = start(tmp_path / "run", Interrupted(6, taken), search={"trials": 4})
    search._say = said.append
    search.run()
    found = search.history().trials
    assert "trial 6 was taken up by another worker" in said[0]
    assert found[6].state is State.RUNNING and not found[6].scores and found[6].worker == ELSEWHERE
    assert search.folder.documents(6).read_text() == "the other's"
    assert all(trial.state is State.COMPLETE for trial in found if trial.number != 6)


def test_the_signs_are_read_once_for_all_trials_at_work(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(3):
        trials.enqueue(search.study, strategy="study", kind=Kind.STATED, key={"at": at})
        trials.write(search.study.ask(), worker=ELSEWHERE)
    beats(search, 1, NOW)
    reads: list[int] = []

    def counted(study: Any) -> dict[str, Sign]:
        reads.append(1)
        return signs(study)

    for place in ("presence", "worker"):
        monkeypatch.setattr(f"mergesearch.search.{place}.signs", counted, raising=False)
    assert search._left_behind(presence(search), search.history()) is None and len(reads) == 1


def test_a_worker_killed_as_it_takes_a_trial_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(BaseException):
        """Stands in for a kill: nothing is written after it."""

    def die(handle: Any, **values: Any) -> None:
        raise Dead

    search = start(tmp_path / "run", search={"trials": 2})
    with monkeypatch.context() as killed, pytest.raises(Dead):
        killed.setattr(trials, "write", die)  # Optuna has given it the trial, and nothing else is noted yet
        search.run()
    monkeypatch.setattr("mergesearch.search.worker.time.sleep", lambda seconds: pytest.fail("it waits for a dead one"))
    with presence(search):  # another one that lives
        start(tmp_path / "run", search={"trials": 2}).run()
    assert all(trial.state is State.COMPLETE for trial in search.history().trials)


def test_a_trial_at_which_worker_after_worker_dies_fails(tmp_path: Path) -> None:
    class Dead(BaseException):
        """Stands in for a kill: nothing is written after it."""

    def die() -> None:
        raise Dead

    folder, numbers = tmp_path / "run", []
    for _ in range(MOST_LOST):
        search = start(folder, Interrupted(6 if not numbers else 0, die))
        with pytest.raises(Dead):
            search.run()
        (left,) = [t for t in search.history().trials if t.state is State.RUNNING]
        numbers.append(left.number)
    assert len(set(numbers)) == 1
    last = start(folder)
    last.run()
    failed = last.history().trials[numbers[0]]
    assert failed.state is State.FAILED and "3 workers in a row ended without a word" in (failed.error or "")
    assert sum(trial.state is State.FAILED for trial in last.history().trials) == 1


def test_candidates_that_all_fail_for_one_reason_end_the_run_and_it_goes_on(tmp_path: Path) -> None:
    bad = [True]

    def broken(recipe: Any) -> Exception | None:
        return CandidateError(f"no room for {len(recipe.id)} bytes on disk {id(recipe)}") if bad[0] and many() else None

    def many() -> bool:
        return len(engine.loaded) > 4

    engine = Engine(broken)
    search = start(tmp_path / "run", engine, search={"trials": 40})
    with pytest.raises(SearchFailed, match=f"the last {MOST_FAILURES} candidates all failed for one reason .no room"):
        search.run()
    assert sum(trial.state is State.FAILED for trial in search.history().trials) == MOST_FAILURES
    bad[0] = False
    engine = Engine()
    start(tmp_path / "run", engine, Scorer(engine), search={"trials": 40}).run()
    assert sum(trial.state is State.COMPLETE for trial in search.history().trials) == 4 + 40 - MOST_FAILURES
