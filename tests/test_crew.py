"""Several workers on one host: started, passed on, started again, ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.searches import start

from mergesearch import cli
from mergesearch.commands.crew import LEASH, MOST_DEATHS, RUN_OVER, Crew, Seat, Shares, command_of, seats, shares
from mergesearch.commands.run import Session
from mergesearch.errors import CandidateError, UserError
from mergesearch.search.presence import SILENT, Sign
from mergesearch.search.worker import SearchFailed

ROOT = Path(__file__).parent.parent


def crew(code: str, said: list[str], *names: str, **given) -> Crew:
    def command(seat: Seat) -> Sequence[str]:
        return [sys.executable, "-S", "-c", code, seat.name]

    return Crew([Seat(name, "cpu") for name in names], command, said.append, **given)


def visible(share: Shares, environment: dict[str, str]) -> list[str]:
    return [seat.environment["CUDA_VISIBLE_DEVICES"] for seat in seats(share, "auto", environment)]


def test_workers_are_spread_over_the_gpus_that_are_to_be_seen() -> None:
    assert visible(Shares(3, 2), {}) == ["0", "1", "0"]
    seen = {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}
    assert visible(Shares(2, 2), seen) == ["GPU-a", "GPU-b"]
    there = seats(Shares(2, 2), "auto", seen)
    assert {seat.device for seat in there} == {"cuda"} and there[1].name == "worker 1 on GPU GPU-b"
    assert seats(Shares(2), "cuda:3", {}) == [Seat("worker 0", "cuda:3"), Seat("worker 1", "cuda:3")]
    assert seats(Shares(2), "auto", {}) == [Seat("worker 0", "auto"), Seat("worker 1", "auto")]
    line = command_of(there[0], "my.yaml", ["search.trials=3"], allow_changed=True)
    assert line[1:] == [
        "-m", "mergesearch", "worker", "my.yaml", "--set", "search.trials=3", "--set", "device=cuda", "--allow-changed",
    ]  # fmt: skip


def test_a_candidate_that_takes_several_gpus_has_them_to_itself() -> None:
    assert visible(Shares(4, 8, 2), {}) == ["0,1", "2,3", "4,5", "6,7"]
    assert visible(Shares(2, 8, 3), {}) == ["0,1,2", "3,4,5"]
    assert {seat.device for seat in seats(Shares(2, 8, 3), "auto", {})} == {"auto"}


def test_how_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = start(tmp_path / "run").config

    def shared(workers: str, device: str = "auto", needed: int = 1) -> Shares:
        return shares(workers, config.model_copy(update={"device": device}), lambda _: needed)

    assert shared("auto", "cuda:1") == Shares(1) and shared("3", "cpu") == Shares(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert shared("auto") == Shares(1) and shared("1") == Shares(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert shared("auto") == Shares(8, 8) and shared("auto", needed=3) == Shares(2, 8, 3)
    assert shared("auto", needed=8) == Shares(1, 8, 8) and shared("3") == Shares(3, 8)
    for wrong in ("0", "-1", "many", "1.5", "5000"):
        with pytest.raises(UserError, match="give a number from 1 to 1024, or auto"):
            shared(wrong)


def test_gpus_are_counted_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has asked CUDA can use none in a fork of itself."""
    asked: list[int] = []

    def count() -> int:
        asked.append(1)
        (tmp_path / f"{os.getpid()}").touch()
        return 12

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    config = start(tmp_path / "run").config
    assert shares("auto", config, lambda _: 1) == Shares(12, 12)
    assert asked == [] and len([path for path in tmp_path.iterdir() if path.name.isdecimal()]) == 1


def test_lines_are_passed_on_and_the_end_is_awaited() -> None:
    said: list[str] = []
    crew("import sys; print('hello from', sys.argv[1]); print('bye')", said, "one", "two").run()
    assert sorted(said) == ["one: bye", "one: hello from one", "two: bye", "two: hello from two"]


MANY = "import sys\nfor n in range(20000): print(n)\nprint('error: the last one'); sys.exit(2)"


def test_the_last_line_of_many_is_passed_on() -> None:
    said: list[str] = []
    with pytest.raises(UserError, match="the last one"):
        crew(MANY, said, "one").run()
    assert said[-1] == "one: error: the last one" and len(said) == 20001


def test_a_worker_that_dies_is_started_again(tmp_path: Path) -> None:
    once = f"""
import os, pathlib, signal
there = pathlib.Path({str(tmp_path / "there")!r})
if not there.exists():
    there.touch()
    os.kill(os.getpid(), signal.SIGKILL)
print("done")
"""
    said: list[str] = []
    crew(once, said, "one").run()
    assert said == ["note: one ended with SIGKILL: it is started again", "one: done"]


def test_one_that_dies_of_the_same_again_and_again_is_given_up_and_the_others_go_on() -> None:
    said: list[str] = []
    crew("import sys; sys.exit('error: no GPU' if sys.argv[1] == 'one' else 0)", said, "one", "two").run()
    assert said.count("one: error: no GPU") == MOST_DEATHS + 1
    assert said[-1] == f"note: one ended {MOST_DEATHS + 1} times with no GPU, and is not started again"
    with pytest.raises(CandidateError, match="no worker is left: the last one ended with no GPU"):
        crew("import sys; sys.exit('error: no GPU')", said, "one").run()


def test_deaths_that_differ_in_a_number_alone_are_alike() -> None:
    said: list[str] = []
    with pytest.raises(CandidateError, match="no worker is left: the last one ended with no room for"):
        crew("import os, sys; sys.exit(f'error: no room for {os.getpid()} bytes')", said, "one").run()
    assert sum("it is started again" in line for line in said) == MOST_DEATHS


def test_where_none_can_go_on_none_is_started_again() -> None:
    code = (
        "import sys, time; sys.argv[1] == 'two' and time.sleep(60); print('error: the last 10 all failed'); "
        f"sys.exit({RUN_OVER})"
    )
    said: list[str] = []
    with pytest.raises(CandidateError, match=r"^the last 10 all failed$"):
        crew(code, said, "one", "two").run()
    assert said == ["one: error: the last 10 all failed"]


@pytest.mark.parametrize(("cause", "ended"), [(None, RUN_OVER), (OSError("this disk is full"), 1)])
def test_a_worker_says_by_its_status_that_none_can_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cause: OSError | None, ended: int
) -> None:
    def fail() -> None:
        raise SearchFailed("the last 10 all failed") from cause

    def search(*_: Any, **__: Any) -> None:
        scorer = SimpleNamespace(close=lambda: None)
        search = SimpleNamespace(run=fail)
        Session.run(cast(Any, SimpleNamespace(mend=lambda say: None, search=search, scorer=scorer)))

    monkeypatch.setattr(cli, "_search", search)
    monkeypatch.setattr(cli, "_settings", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["mergesearch", "worker", str(tmp_path / "my.yaml")])
    assert cli.status() == ended


def test_workers_share_the_cores_unless_somebody_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*names: str) -> list[str]:
        said: list[str] = []
        crew("import os; print(os.environ.get('OMP_NUM_THREADS'))", said, *names).run()
        return sorted(said)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert given("one") == ["one: None"]
    assert given("one", "two", "three") == ["one: 2", "three: 2", "two: 2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert given("one", "two") == ["one: 5", "two: 5"]


def test_wrong_input_is_said_once() -> None:
    code = "import sys, time; sys.argv[1] == 'two' and time.sleep(60); print('error: no such key'); sys.exit(2)"
    with pytest.raises(UserError, match=r"^no such key$"):
        crew(code, [], "one", "two").run()


def test_an_interruption_ends_them_in_order(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
def handed_back(*_):
    pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, handed_back)
print("at work", flush=True)
time.sleep(60)
"""
    heard: list[str] = []

    def say(line: str) -> None:
        heard.append(line)
        if len(heard) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Crew(
            [Seat("one", "cpu"), Seat("two", "cpu")],
            lambda seat: [sys.executable, "-S", "-c", code, seat.name],
            say,
        ).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = f"""
import pathlib, time
there = pathlib.Path({str(tmp_path / "there")!r})
if not there.exists():
    there.touch()
    print("stuck", flush=True)
    time.sleep(60)
"""
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 31.0
        return seconds[0]

    def signs() -> dict[str, Sign]:
        now = datetime.now(timezone.utc)
        pid = one._workers[0].process.pid if one._workers[0].process else 0
        return {"id": Sign("id", os.uname().nodename, pid, "cpu", 1, now, now)}

    said: list[str] = []
    one = crew(code, said, "one", signs=signs, clock=clock)
    one.run()
    assert f"note: one has given no sign of life for {SILENT:.0f} s: it is ended" in said
    assert "note: one ended with SIGKILL: it is started again" in said


def test_a_sign_of_one_that_had_its_number_before_says_nothing() -> None:
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 31.0
        return seconds[0]

    def signs() -> dict[str, Sign]:
        now, before = datetime.now(timezone.utc), datetime(2026, 1, 2, tzinfo=timezone.utc)
        pid = one._workers[0].process.pid if one._workers[0].process else 0
        mine = Sign("mine", os.uname().nodename, pid, "cpu", int(seconds[0]), now, now)
        return {"mine": mine, "old": Sign("old", os.uname().nodename, pid, "cpu", 1, before, before)}

    said: list[str] = []
    one = crew("import time; time.sleep(3)", said, "one", signs=signs, clock=clock)
    one.run()
    assert said == []


@pytest.mark.parametrize("waits", [False, True], ids=["it fails", "it does not answer"])
def test_a_storage_that_is_away_for_long_kills_no_worker(waits: bool) -> None:
    seconds, looks = [0.0], [0]

    def clock() -> float:
        seconds[0] += 31.0
        return seconds[0]

    def signs() -> dict[str, Sign]:
        looks[0] += 1
        if 3 <= looks[0] < 20 and not waits:
            return {}
        seconds[0] += 1000.0 * (looks[0] == 3)
        now = datetime.now(timezone.utc)
        pid = one._workers[0].process.pid if one._workers[0].process else 0
        # the first sign after it comes a look later
        return {"id": Sign("id", os.uname().nodename, pid, "cpu", max(looks[0], 5 if waits else 21), now, now)}

    said: list[str] = []
    one = crew("import time; time.sleep(8)", said, "one", signs=signs, clock=clock)
    one.run()
    assert looks[0] > 5 and said == []


def test_a_worker_ends_when_whoever_started_it_is_gone() -> None:
    code = (
        "import os, time; from mergesearch.commands.crew import hold_leash; hold_leash(os.environ); "
        "print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, LEASH: "1", "PYTHONPATH": str(ROOT)}
    held = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert held.stdin is not None and held.stdout is not None
    assert held.stdout.readline() == b"held\n"
    time.sleep(0.1)
    assert held.poll() is None
    held.stdin.close()
    assert held.wait(timeout=60) == -signal.SIGTERM
