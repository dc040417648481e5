"""What `search.hours` keeps back for the report that a run ends with."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.races import SIZE, start

from mergesearch.commands.holdout import cost
from mergesearch.commands.page import watch
from mergesearch.commands.room import SHARE, ReportRoom
from mergesearch.results.loading import Run, load_run, run_of
from mergesearch.search import store
from mergesearch.search.budget import Budget
from mergesearch.search.costs import costs, duration
from mergesearch.search.estimate import estimate
from mergesearch.search.history import ROOM, History
from mergesearch.search.speed import Probe
from mergesearch.search.store import RunFolder, write_documents
from mergesearch.search.trials import State, Trial
from mergesearch.search.worker import Search

HOLDOUT = 3 * SIZE


def searched(folder: Path, hours: float | None, at_end: bool = True) -> Search:
    search = start(
        folder,
        racing=None,
        report={"at_end": at_end},
        search={"trials": 2, "seed": 3, "hours": hours, "defaults": False, "strategy": "random"},
    )
    write_documents(
        RunFolder(folder), {"search": {"quiz": list(range(SIZE))}, "holdout": {"quiz": list(range(HOLDOUT))}}
    )
    search.run()
    return search


def room_of(search: Search, probe: Probe, said: list[str], clock: Any = None) -> ReportRoom:
    def read() -> Run:
        return run_of(search.history(), search.folder)

    def note(key: str, value: dict[str, object]) -> None:
        store.note(search.study, key, value)

    return ReportRoom(search.config, probe, read, note, said.append, **({"clock": clock} if clock else {}))


def test_what_the_report_will_take_is_kept_back_and_said(tmp_path: Path) -> None:
    search, said = searched(tmp_path / "run", 2.0), []
    # lm-eval's own model takes 0.5 s a document, as it was tried; base, two models, average and winner are asked again
    probe = Probe({"quiz": SIZE}, {"quiz": 0.1}, merge=2.0, export=9.0, again=5 * (2.0 + 0.5 * SIZE))
    assert search.history().hours_kept == 0.0
    unfinished = search.config.model_copy(update={"search": search.config.search.model_copy(update={"trials": 9})})
    lines = costs(History(search.study, unfinished))
    assert lines[-1].startswith("left: ") and not any(line.startswith("kept: ") for line in lines)
    room_of(search, probe, said).look()
    report = cost(load_run(tmp_path / "run"), probe=probe)
    assert report is not None and report.each == HOLDOUT
    # every finalist and the winner a second time, at lm-eval's pace; the stand-in merges in 0.25 s
    scorings = report.candidates + 1
    assert report.seconds == pytest.approx(scorings * 0.5 * HOLDOUT, rel=1e-2)
    # by the end there are three finalists beside the base, two models and the average
    assert report.candidates == 6
    seconds = report.seconds * 8 / scorings + probe.again + 9.0
    history = History(search.study, search.config)
    assert history.notes[ROOM]["seconds"] == pytest.approx(seconds)
    assert history.hours_kept == pytest.approx(min(seconds / 3600, 1.0))
    assert history.hours_to_search == pytest.approx(2.0 - history.hours_kept)
    assert said == [f"note: of 2 h {duration(3600 * history.hours_kept)} are kept back {history.notes[ROOM]['words']}"]
    assert f"7 candidates on {HOLDOUT} documents each, the winner twice" in said[0]


def test_the_search_ends_earlier_by_it_and_watch_says_so(tmp_path: Path) -> None:
    search = searched(tmp_path / "run", 1.0)
    store.note(search.study, ROOM, {"seconds": 900, "words": "for the report"})
    config = search.config.model_copy(update={"search": search.config.search.model_copy(update={"trials": 1000})})
    history = History(search.study, config)
    assert history.hours_kept == 0.25 and history.hours < 0.05
    taken = datetime.now()
    soup = Trial(len(history.trials), State.RUNNING, taken=taken)  # after all the others
    history.trials.append(soup)
    over = [Budget(history).is_over(soup.number, taken + timedelta(hours=hours)) for hours in (0.65, 0.75)]
    assert over == [False, True]
    history.trials.pop()
    probe = Probe({"quiz": SIZE}, {"quiz": 0.1}, merge=1.0)
    with_room = estimate(config, history, probe)
    store.note(search.study, ROOM, {"seconds": 0, "words": ""})
    without = estimate(config, History(search.study, config), probe)
    assert with_room is not None and without is not None
    assert with_room.trials == pytest.approx(0.75 * without.trials, rel=0.05)
    # no more than half is kept, whatever the report will take
    store.note(search.study, ROOM, {"seconds": 90000, "words": "for the report"})
    assert History(search.study, config).hours_kept == 0.5
    # whoever looks from anywhere reads it in the storage
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    seen: list[Run] = []

    def look(run: Run) -> None:
        seen.append(run)
        if len(seen) == 1:
            (tmp_path / "run" / "config.yaml").write_text(search.config.to_yaml())

    watch(tmp_path / "run", None, 1.0, look, lambda seconds: None)
    assert "kept: 30 min of 1 h for the report" in seen[0].words
    assert not any(line.startswith("kept:") for line in seen[-1].words)


def test_nothing_is_kept_where_no_report_follows_or_no_hours_end_the_run(tmp_path: Path) -> None:
    for name, hours, at_end in (("a", 2.0, False), ("b", None, True)):
        search, said = searched(tmp_path / name, hours, at_end), []
        room_of(search, Probe({"quiz": SIZE}, again=100.0), said).look()
        assert said == [] and not store.has_note(search.study, ROOM)
        store.note(search.study, ROOM, {"seconds": 900, "words": "of an earlier start"})
        assert History(search.study, search.config).hours_kept == 0.0


def test_finding_out_takes_little_of_the_time(tmp_path: Path) -> None:
    search, times, reads = searched(tmp_path / "run", 2.0), [0.0], []
    room = room_of(search, Probe({"quiz": SIZE}), [], lambda: times[0])
    real = room._read

    def read() -> Run:
        reads.append(times[0])
        times[0] += 1.0
        return real()

    room._read = read
    for _ in range(5):
        room.look()
    assert reads == [0.0]
    times[0] += SHARE
    room.look()
    assert len(reads) == 2
