"""One worker of `mergesearch run`: started again when it dies, interrupted once, never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import QUICKSTART

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

def first(name):
    # whether no worker has come here before
    try:
        (PLACE / name).touch(exist_ok=False)
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

APP, cli.app = cli.app, verb
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


def test_a_worker_that_dies_or_hangs_is_started_again_and_no_trial_is_lost_or_done_twice(tmp_path: Path) -> None:
    code = """
from support.searches import Engine, start

class Deadly(Engine):
    def load(self, recipe):
        if len(self.loaded) == 5 and first("killed"):
            kill()
        if len(self.loaded) == 3 and (PLACE / "killed").exists() and first("hung"):
            while True:
                time.sleep(1)
        note("trial " + recipe.id)
        return super().load(recipe)

def work():
    search = start(PLACE / "run", Deadly(), say=note, search={"trial_timeout": 2})
    search._hung = cli._end_hung
    search.run()
    note(" ".join(trial.state.value for trial in search.history().trials))
"""
    status, out, err = ended(start(code, tmp_path))
    assert status == 0 and err == ""
    assert [line for line in out if line.startswith("note: the worker")] == [
        "note: the worker ended with SIGKILL: it is started again",
        "note: the worker ended with trial 8 was given up: it took more than 2 s (search.trial_timeout): it is started "
        "again",
    ]
    trials, states = [line for line in out if line.startswith("trial ")], out[-1].split()
    assert len(trials) == len(set(trials)) == states.count("complete") and len(states) >= 14
    assert states.count("failed") == 1 and set(states) == {"complete", "failed"}


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
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        if first(number.name):
            kill(number)
"""
    said = [f"note: the worker ended with {name}: it is started again" for name in ("SIGSEGV", "SIGBUS", "SIGABRT")]
    assert ended(start(code, tmp_path)) == (0, said, "")


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


def test_an_interruption_as_it_begins_ends_it_in_order(tmp_path: Path) -> None:
    code = "work = kill\nwatching._die_with = lambda parent: kill(signal.SIGTERM)\n"
    assert ended(start(code, tmp_path)) == (1, [], f"error: {LINE}\n")


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
    for sent in (signal.SIGINT, signal.SIGTERM):  # of one kind the system would make one, where they wait
        os.killpg(begun.pid, sent)
    assert ended(begun) == (130, [], f"error: {LINE}\n") and not is_there(worker)


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "alone"])
def test_what_does_not_end_in_order_is_ended(tmp_path: Path, watched: bool) -> None:
    code = """
import hashlib
signals.HANDS_BACK = 0.3

def work():
    try:
        note("working")
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


def test_the_end_is_told_once_by_the_worker_or_by_whoever_waited_for_it(tmp_path: Path) -> None:
    code = """
def fail():
    raise CandidateError("nothing was scored")

from mergesearch.errors import CandidateError
cli.app, cli._search = APP, lambda *_: {work}()
sys.argv = ["mergesearch", "run", {config!r}, "--set", "device=cpu", "--set", {hook!r}]
"""
    begun = {}
    for work in ("kill", "fail"):
        hook = f"on_end=echo $MERGESEARCH_STATUS $MERGESEARCH_VERDICT >> {tmp_path / work}.told"
        given = code.format(work=work, config=QUICKSTART, hook=hook)
        begun[work] = start(given, tmp_path)
    assert {ended(each)[0] for each in begun.values()} == {1}
    assert (tmp_path / "fail.told").read_text() == "1 nothing was scored\n"
    told = (tmp_path / "kill.told").read_text()
    assert told.startswith(f"1 the worker ended {MOST_DEATHS + 1} times with SIGKILL") and told.count("\n") == 1


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
