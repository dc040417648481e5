"""One worker of `mergesearch run`: started again when it dies, interrupted once, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergesearch import signals
from mergesearch.commands.crew import MOST_DEATHS
from mergesearch.commands.watching import UNWATCHED

ROOT = Path(__file__).parent.parent
LINE = "interrupted; what was scored is kept. To go on: the same again"
# the command with a stand-in for its work
COMMAND = f"""
import os, pathlib, signal, sys, threading, time
from mergesearch import cli, signals
from mergesearch.commands import watching

PLACE = pathlib.Path(sys.argv[1])

def note(text):
    print(text, flush=True)

def kill(sent=signal.SIGKILL):
    os.kill(os.getpid(), sent)
    for _ in range(1000): pass

def first():
    # whether this is the first worker
    try:
        (PLACE / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def hand_back():
    note("handed back")

def verb(**_):
    signals.how_to_go_on({LINE!r})
    watching.watch(note)
    note("worker " + str(os.getpid()))
    with signals.at_work():
        try:
            work()
        except KeyboardInterrupt:
            hand_back()
            raise

cli.app = verb
{{code}}
cli.main()
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != UNWATCHED}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **more}


def start(code: str, place: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(code=code), str(place)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(**more), start_new_session=True,
    )  # fmt: skip


def at_work(begun: subprocess.Popen[str]) -> int:
    """The process of the worker, once it works."""
    assert begun.stdout is not None
    said, number = begun.stdout.readline().split()
    assert said == "worker" and begun.stdout.readline() == "working\n"
    return int(number)


def ended(begun: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    out, err = begun.communicate(timeout=120)
    return begun.returncode, [line for line in out.splitlines() if not line.startswith("worker ")], err


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process: int) -> bool:
    """Whether a process ends soon."""
    until = time.monotonic() + 20
    while is_there(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_there(process)


# no step of Python's own comes after the first word
HOLDS_THE_LOCK = """
import functools, itertools

def work():
    any(itertools.chain(map(functools.partial(print, flush=True), ["working"]), itertools.repeat(False)))
"""
WAITS = """
def work():
    note("working")
    time.sleep(60)
"""


def test_a_worker_that_dies_is_started_again_and_no_trial_is_lost_or_done_twice(tmp_path: Path) -> None:
    code = """
from support.searches import Engine, start

class Deadly(Engine):
    def load(self, recipe):
        if len(self.loaded) == 7 and first():
            kill()
        note("trial " + recipe.id)
        return super().load(recipe)

def work():
    search = start(PLACE / "run", Deadly(), say=note)
    search.run()
    note(" ".join(trial.state.value for trial in search.history().trials))
"""
    status, out, err = ended(start(code, tmp_path))
    assert status == 0 and err == ""
    assert out.count("note: the worker ended with SIGKILL: it is started again") == 1
    trials = [line for line in out if line.startswith("trial ")]
    assert len(trials) == len(set(trials)) and len(out[-1].split()) >= 14 and set(out[-1].split()) == {"complete"}


def test_one_that_dies_of_the_same_again_and_again_is_given_up_in_one_sentence(tmp_path: Path) -> None:
    status, out, err = ended(start("work = kill", tmp_path))
    assert status == 1 and out == ["note: the worker ended with SIGKILL: it is started again"] * MOST_DEATHS
    assert err == (
        f"error: the worker ended {MOST_DEATHS + 1} times with SIGKILL, and is not started again; what was scored is "
        "kept, and the same command goes on\n"
    )


def test_the_reason_is_named_and_a_few_of_several_reasons_end_nothing(tmp_path: Path) -> None:
    code = """
def work():
    sent = [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT]
    for number in sent:
        if not (PLACE / number.name).exists():
            (PLACE / number.name).touch()
            kill(number)
"""
    said = [f"note: the worker ended with {name}: it is started again" for name in ("SIGSEGV", "SIGBUS", "SIGABRT")]
    assert ended(start(code, tmp_path)) == (0, said, "")


def test_a_trial_that_takes_too_long_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    code = """
from support.searches import Engine, start

class Stuck(Engine):
    def load(self, recipe):
        if len(self.loaded) == 5 and first():
            while True:
                time.sleep(1)
        return super().load(recipe)

def work():
    search = start(PLACE / "run", Stuck(), say=note, search={"trial_timeout": 2})
    search._hung = cli._end_hung
    search.run()
    note(" ".join(trial.state.value for trial in search.history().trials))
"""
    status, out, err = ended(start(code, tmp_path))
    assert status == 0 and err == ""
    assert [line for line in out if "ended" in line] == [
        "note: the worker ended with trial 5 was given up: it took more than 2 s (search.trial_timeout): it is started "
        "again"
    ]
    assert out[-1].split().count("failed") == 1 and set(out[-1].split()) == {"complete", "failed"}


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_reaches_it_once_whoever_was_sent_it(tmp_path: Path, sent: signal.Signals, both: bool) -> None:
    begun = start(WAITS, tmp_path)
    worker = at_work(begun)
    if both:
        os.killpg(begun.pid, sent)
    else:
        begun.send_signal(sent)
    assert ended(begun) == (1, ["handed back"], f"error: {LINE}\n") and not is_there(worker)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_a_second_one_ends_both_at_once(tmp_path: Path, both: bool) -> None:
    code = """
def hand_back():
    note("handing back")
    time.sleep(60)
"""
    begun = start(WAITS + code, tmp_path)
    worker = at_work(begun)
    for _ in range(2):
        if both:
            os.killpg(begun.pid, signal.SIGINT)
        else:
            begun.send_signal(signal.SIGTERM)
        if _ == 0:
            assert begun.stdout is not None and begun.stdout.readline() == "handing back\n"
    assert ended(begun) == (130, [], f"error: {LINE}\n") and not is_there(worker)


def test_a_second_one_waits_for_no_library_that_lets_nothing_else_run(tmp_path: Path) -> None:
    """A call that holds Python's lock keeps the worker's own clock from its turn: whoever waits ends it."""
    begun = start(HOLDS_THE_LOCK, tmp_path)
    worker = at_work(begun)
    os.killpg(begun.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(begun.pid, signal.SIGINT)
    assert ended(begun) == (130, [], f"error: {LINE}\n") and not is_there(worker)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "alone"])
def test_what_does_not_end_in_order_is_ended(tmp_path: Path, watched: bool) -> None:
    code = """
import hashlib
signals.HANDS_BACK = 0.3

def work():
    note("working")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""
    begun = start(code, tmp_path, **({} if watched else {UNWATCHED: "1"}))
    worker = at_work(begun)
    assert (worker != begun.pid) == watched
    begun.send_signal(signal.SIGTERM)
    assert ended(begun) == (1, [], f"error: {LINE}\n") and not is_there(worker)


def test_what_lets_nothing_else_run_is_ended_by_whoever_waits(tmp_path: Path) -> None:
    begun = start("signals.HANDS_BACK = watching.SPARE = 0.3" + HOLDS_THE_LOCK, tmp_path)
    worker = at_work(begun)
    begun.send_signal(signal.SIGTERM)
    assert ended(begun) == (1, [], f"error: {LINE}\n") and not is_there(worker)


def test_what_comes_after_the_work_takes_its_time(tmp_path: Path) -> None:
    code = """
signals.HANDS_BACK = watching.SPARE = 0.1

def work():
    note("working")
    time.sleep(60)

def verb(before=verb, **given):
    try:
        before(**given)
    except KeyboardInterrupt:
        time.sleep(1.5)
        note("told")
        raise

cli.app = verb
"""
    begun = start(WAITS + code, tmp_path)
    at_work(begun)
    begun.send_signal(signal.SIGTERM)
    assert ended(begun) == (1, ["handed back", "told"], f"error: {LINE}\n")


def test_a_worker_does_not_live_on_alone(tmp_path: Path) -> None:
    begun = start(WAITS, tmp_path)
    worker = at_work(begun)
    begun.kill()
    assert gone(worker)
    begun.communicate()


def test_where_the_system_does_not_end_it_the_leash_does(tmp_path: Path) -> None:
    begun = start(WAITS + "watching._die_with = lambda parent: None\n", tmp_path)
    worker = at_work(begun)
    begun.kill()
    assert gone(worker) and ended(begun)[1] == ["handed back"]


@pytest.mark.parametrize("status", [0, 2, 3])
def test_its_exit_status_is_the_commands(tmp_path: Path, status: int) -> None:
    code = f"def verb(before=verb, **given): before(**given); return {status}\ncli.app = verb; work = lambda: None"
    assert ended(start(code, tmp_path)) == (status, [], "")


def test_what_a_library_makes_of_the_end_of_the_process_changes_nothing(tmp_path: Path) -> None:
    code = "import atexit\ndef work(): atexit.register(kill, signal.SIGABRT)"
    assert ended(start(code, tmp_path)) == (0, [], "")


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    code = """
def work():
    note("working")
    for _ in range(60):
        time.sleep(0.02)
"""
    begun = start(f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}", tmp_path)
    at_work(begun)
    os.killpg(begun.pid, signal.SIGHUP)
    assert ended(begun) == (0, [], "")


def test_a_program_that_is_not_the_command_does_its_work_itself(tmp_path: Path) -> None:
    assert not signals.is_installed()
    code = "work = lambda: note('mine' if os.getpid() == os.getsid(0) else 'another')"
    assert ended(start(code, tmp_path, **{UNWATCHED: "1"}))[1] == ["mine"]
    assert ended(start(code, tmp_path))[1] == ["another"]
