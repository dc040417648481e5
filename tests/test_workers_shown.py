"""Who is at work on a run, as any host sees it while it goes on."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from rich.console import Console
from support.searches import start

from mergesearch import memory
from mergesearch.commands.progress import RunProgress
from mergesearch.commands.table import brief
from mergesearch.results.loading import run_of
from mergesearch.results.record import Record, record_of
from mergesearch.results.workers import Worker, crew_of, failures, pace
from mergesearch.search import presence, store
from mergesearch.search.history import History
from mergesearch.search.presence import SILENT, Presence, Sign, signs
from mergesearch.search.trials import State, Trial
from mergesearch.search.worker import Search

NOW = datetime.now(timezone.utc)
LOCAL = NOW.astimezone().replace(tzinfo=None)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    done = start(tmp_path_factory.mktemp("shown") / "run", search={"trials": 3, "seed": 3})
    done.run()
    return done


def sign(worker: str, host: str, device: str = "cpu", ago: float = 5.0, **more: object) -> Sign:
    return Sign(worker, host, 71, device, 3, NOW - timedelta(seconds=ago), NOW - timedelta(hours=1), **more)


def test_every_worker_with_what_it_does_and_its_memory(search: Search) -> None:
    history = History(search.study, search.config)
    one, *_ = history.trials
    method = one.recipe_data["rules"][0]["method"] if one.recipe_data else ""
    mine = {
        "state": State.RUNNING, "strategy": "study", "key": {"stage": "study"}, "scores": {}, "settled_at": None,
    }  # fmt: skip
    history.trials = [
        replace(one, number=0, worker="b", **mine, taken=LOCAL - timedelta(seconds=40)),
        *(replace(one, number=n, worker="a", settled_at=LOCAL - timedelta(minutes=n)) for n in range(1, 13)),
    ]
    there = {
        "a": sign("a", "node1"),
        "b": sign("b", "node2", "cuda:0", doing="120 of 400 documents", used=31 * 2**30, memory=80 * 2**30),
        "over": sign("over", "node3", ended=True),
        "long gone": sign("long gone", "node4", ago=SILENT + 60),
    }
    lines = crew_of(history, there, NOW).words()
    assert lines[0].startswith("workers: 2, ") and lines[0].endswith(" trials an hour together")
    assert lines[1:] == [
        "worker: node1, process 71, cpu: between trials; 12 trials",
        f"worker: node2, process 71, cuda:0 (31 of 80 GiB): trial 0 study {method} for 40 s, 120 of 400 documents; "
        "0 trials",
    ]
    # a worker that is silent and holds a trial is shown until somebody takes it up
    there["b"] = sign("b", "node2", ago=SILENT + 120)
    assert "no sign for 5 min" in crew_of(history, there, NOW).words()[2]
    assert crew_of(history, there, NOW).living
    del there["a"]
    silent = crew_of(history, there, NOW)
    assert len(silent.workers) == 1 and not silent.living


def test_the_pace_is_that_of_all_workers_in_the_last_hour() -> None:
    def trial(number: int, minutes: float, worker: str) -> Trial:
        when = LOCAL - timedelta(minutes=minutes)
        return Trial(number, State.COMPLETE, worker=worker, taken=when - timedelta(minutes=5), settled_at=when)

    every = [trial(n, 5.0 * (n // 2), f"w{n % 2}") for n in range(8)]  # two workers, each a trial in 5 minutes
    assert pace(every, NOW) == pytest.approx(24.0)
    assert pace([*every, trial(8, 300.0, "w0")], NOW) == pytest.approx(24.0)
    assert pace(every[:1], NOW) is None and pace([trial(0, 90.0, "w0"), trial(1, 80.0, "w1")], NOW) is None


def test_what_watch_says_between_two_tables(search: Search) -> None:
    with Presence(search.folder, search.study, doing=lambda: "80 of 90 documents"):
        (mine,) = [sign for sign in signs(search.study).values() if not sign.ended]
        assert mine.doing == "80 of 90 documents" and mine.used is None
        since = (NOW - datetime.now(timezone.utc)).total_seconds()
        store.note(search.study, "worker:far", sign("far", "far-away", ago=since).to_data())
        run = run_of(History(search.study, search.config), search.folder)
    text = brief(replace(run, records=(*run.records, *(failed(n, f"out of memory at {n - 87}") for n in (90, 91)))))
    assert text[0].startswith("workers: 2") and sum(line.startswith("worker: ") for line in text) == 2
    best = run.best()
    assert best is not None and f"best so far: {best.objective:.4f}, trial {best.number}" in text[3]
    assert text[4] == "failed: 2 trials (90, 91): out of memory at 3" and text[5].startswith("cost: ")
    # and whoever asks for the table sees them too, as long as they are there
    assert any(line.startswith("worker: far-away, process 71, cpu") for line in run.words)
    store.note(search.study, "worker:far", sign("far", "far-away", ended=True).to_data())
    assert run_of(History(search.study, search.config), search.folder).crew.workers == ()


def failed(number: int, error: str) -> Record:
    return Record(number, None, "failed", error=error)


def test_reasons_are_counted_and_cut() -> None:
    many = [failed(n, "no room") for n in range(9)] + [failed(20 + n, f"broken {'abcdefg'[n]}") for n in range(7)]
    lines = failures(many)
    assert lines[0] == "failed: 9 trials (0, 1, 2, 3, 4, 5, ...): no room"
    assert len(lines) == 6 and lines[-1] == "failed: for 3 more reasons"
    assert failures([Record(1, None, "complete")]) == []


def test_a_gpu_worker_says_what_its_device_has(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_device", lambda device: (10, 100) if str(device) == "cuda:1" else (0, 0))
    assert presence._memory("cuda:1") == (90, 100) and presence._memory("cpu") == (None, None)
    given = sign("a", "node1", "cuda:1", used=90, memory=100)
    assert Sign.from_data("a", given.to_data()) == given
    old = {k: v for k, v in given.to_data().items() if k not in ("doing", "used", "memory")}
    assert Sign.from_data("a", old).memory is None
    assert (
        Worker("node1", 7, "cuda:1", "waits", 1, 0.0, (2**30, 2**31)).words().startswith("node1, process 7, cuda:1 (1")
    )


def test_progress_counts_the_trials_of_all_workers(search: Search) -> None:
    history = History(search.study, search.config)
    told = io.StringIO()
    progress = RunProgress(search.config, Console(file=told, width=200))
    progress.begin(lambda: history, [], lambda: None)
    mine = record_of(history.trials[-1], history.objective)
    progress.finished(mine)
    every, best = len(history.trials), history.complete()[0]
    line = told.getvalue().splitlines()[-1]
    assert line.startswith(f"[{every}/{every}] trial {mine.number} ")
    assert f"highest score {history.value(best):.4f}, trial {best.number};" in line
    assert progress.doing() == progress._view.doing
