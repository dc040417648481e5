"""The command interrupted in every phase, by every signal, once and twice."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest
from support.commands import QUICKSTART, Done
from support.late import some

ROOT = Path(__file__).parent.parent
TO_GO_ON = f"To go on: mergesearch run {QUICKSTART} --set name=mine"

BEGIN = """
import importlib.abc, os, signal, sys, types

SIGNAL = {signal}

class Interrupts(importlib.abc.MetaPathFinder):
    '''Sends a signal where a module is about to be loaded.'''

    def __init__(self, name, swallow):
        self.name, self.swallow = name, swallow

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            self.name = None
            try:
                os.kill(os.getpid(), SIGNAL)
                for _ in range(1000): pass
            except KeyboardInterrupt:
                if not self.swallow:
                    raise
                raise ImportError("something went wrong while loading")

def kill():
    os.kill(os.getpid(), SIGNAL)
    for _ in range(1000): pass

sys.argv = ["mergesearch", *{arguments}]
"""
# a search that is over at once, and what comes after it
SEARCHED = """
from mergesearch.commands import progress, run, table

progress.RunProgress.begin = lambda *_: None

class Session:
    search = types.SimpleNamespace(history=lambda: None)
    def read(self): return types.SimpleNamespace(records=[])
    def run(self, say): search()
    def score_again(self, say): pass
    def export_best(self): export()

def search(): pass
def export(): raise AssertionError("it is exported")
def show(found): return ["the table"]

run.prepare = lambda *_, **__: Session()
table.show = lambda found: show(found)
"""
END = """
from mergesearch.__main__ import main
main()
"""


def command(code: str, sent: signal.Signals = signal.SIGINT, arguments: list[str] | None = None) -> Done:
    arguments = ["run", QUICKSTART, "--set", "name=mine"] if arguments is None else arguments
    whole = BEGIN.format(signal=int(sent), arguments=arguments) + code + END
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # not where the quickstart's own run may lie, which whoever reads the README has begun
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-c", whole], capture_output=True, text=True, cwd=empty, env=environment, timeout=300
        )
    return Done(done.returncode, done.stdout, done.stderr)


def _sent(quick: signal.Signals) -> pytest.MarkDecorator:
    """Both signals go one way through the code, so the second is for the long form."""
    both = [signal.SIGTERM, signal.SIGINT]
    return pytest.mark.parametrize("sent", some(both, now=[quick]), ids=[sent.name for sent in both])


BY_TERM, BY_INT = _sent(signal.SIGTERM), _sent(signal.SIGINT)


@pytest.mark.parametrize(
    ("module", "swallow", "sent"),
    [
        ("typer", False, signal.SIGTERM),
        ("mergesearch.commands.completing", True, signal.SIGINT),
        ("yaml", False, signal.SIGINT),
        ("torch", False, signal.SIGTERM),
        ("torch", True, signal.SIGINT),
    ],
)
def test_while_modules_are_loaded(module: str, swallow: bool, sent: signal.Signals) -> None:
    done = command(f"sys.meta_path.insert(0, Interrupts({module!r}, {swallow}))", sent)
    assert done.status == 1, done
    assert done.err.startswith("error: interrupted") and done.err.count("\n") == 1 and TO_GO_ON in done.err


@BY_TERM
def test_while_models_are_loaded(sent: signal.Signals) -> None:
    done = command("from mergesearch.commands import run\nrun.load_tasks = lambda *_: kill()\n", sent)
    assert done.status == 1 and TO_GO_ON in done.err and done.err.count("\n") == 1, done
    assert not (ROOT / "results" / "mine").exists()


@BY_INT
def test_while_it_searches_the_table_is_shown_too(sent: signal.Signals) -> None:
    done = command(SEARCHED + "search = kill\n", sent)
    assert done.status == 1 and done.err == "" and "the table" in done.out
    assert done.out.splitlines()[-1] == f"interrupted; what was scored is kept. {TO_GO_ON}"


@BY_TERM
def test_while_the_winner_is_exported(sent: signal.Signals) -> None:
    done = command(SEARCHED + "export = kill\n", sent)
    assert done.status == 1 and done.err == f"error: interrupted; what was scored is kept. {TO_GO_ON}\n", done


@BY_INT
def test_the_second_ends_it_at_once_with_the_same_line(sent: signal.Signals) -> None:
    late = """
search = kill

def show(found):
    print("the ta", end="", flush=True)
    kill()
    raise AssertionError("it goes on")
"""
    done = command(SEARCHED + late, sent)
    assert done.status == 130 and done.out.endswith("the ta"), done
    assert done.err == f"error: interrupted; what was scored is kept. {TO_GO_ON}\n"


@BY_TERM
def test_the_second_waits_for_no_library(sent: signal.Signals) -> None:
    """Python's own handlers have their turn only once a call into a library is over."""
    busy = """
import hashlib, threading

def search():
    try:
        kill()
    except KeyboardInterrupt:
        threading.Thread(target=kill, daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""
    done = command(SEARCHED + busy, sent)
    assert done.status == 130 and done.err.endswith(f"{TO_GO_ON}\n") and done.err.count("\n") == 1, done


def test_a_signal_that_a_library_has_swallowed_ends_the_search_all_the_same() -> None:
    swallowed = """
def search():
    try:
        kill()
    except KeyboardInterrupt:
        pass
    told["started"](None)

def prepare(settings, **listeners):
    told.update(listeners)
    return Session()

told = {}
run.prepare = prepare
"""
    done = command(SEARCHED + swallowed)
    assert done.status == 1 and done.out.splitlines()[-1].endswith(TO_GO_ON), done


def test_a_signal_after_the_work_is_done_changes_nothing() -> None:
    done = command("import atexit\natexit.register(kill)\n", arguments=["strategies", "--format", "json"])
    assert done.status == 0 and done.err == "" and done.out.startswith("[")


def _in_terminal() -> None:
    """In the new process: its standard input is its terminal, and a hang-up is heard, whoever ignored it before."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_closed_terminal_ends_it_in_order_though_it_hangs_up_twice(tmp_path: Path) -> None:
    """Writing to a terminal that is gone is an error; a shell and the kernel both say that it is."""
    waits = f"""
import pathlib, time
from mergesearch import signals

signals.HANDS_BACK = 100.0  # whatever else the machine is busy with

def search():
    print("searching", flush=True)
    time.sleep(60)
    pathlib.Path({str(tmp_path / "slept on")!r}).touch()

def show(found):
    os.kill(os.getpid(), signal.SIGHUP)
    print("to nobody", flush=True)
    pathlib.Path({str(tmp_path / "shown")!r}).touch()
    return ["the table"]
"""
    arguments = ["run", QUICKSTART, "--set", "name=mine"]
    whole = BEGIN.format(signal=int(signal.SIGHUP), arguments=arguments) + SEARCHED + waits + END
    ours, theirs = pty.openpty()
    begun = subprocess.Popen(
        [sys.executable, "-c", whole], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=_in_terminal,
    )  # fmt: skip
    os.close(theirs)
    heard = b""
    while b"searching" not in heard:
        heard += os.read(ours, 1024)
    os.close(ours)
    assert begun.wait(timeout=120) == 1 and [path.name for path in tmp_path.iterdir()] == ["shown"]


def test_a_password_on_the_command_line_is_not_repeated() -> None:
    url = "storage=postgresql://me:hunter2@host/runs"
    done = command("sys.meta_path.insert(0, Interrupts('torch', False))", arguments=["run", QUICKSTART, "--set", url])
    assert done.status == 1 and "hunter2" not in done.err and "me:***@host" in done.err
