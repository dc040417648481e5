"""`mergesearch run` with one worker: a process that does the work, and this one, which starts another when it dies.

The worker is a fork, so that nothing is loaded twice and it prints where the command prints. Its exit status is the
command's. What ends it without a word, the system or `search.trial_timeout`, is counted as with several workers. An
interruption reaches it once, whether it was sent to both processes or to this one alone, and it never lives longer than
this one does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from mergesearch import signals
from mergesearch.commands.crew import Deaths, fork
from mergesearch.errors import CandidateError

# in the environment: the command does its work itself, as a debugger may want it
UNWATCHED = "MERGESEARCH_UNWATCHED"
# seconds beside `signals.HANDS_BACK` for a worker whose own clock does not get its turn
SPARE = 5.0
# seconds for a worker to end that was told to do so at once
_SOON = 1.0
_LOOKS = 1.0  # seconds between looks whether an interrupted worker has handed back what it was at
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class _Forked:
    """Where its process is, how it is told of signals, and what it says."""

    pid: int
    leash: int
    page: signals.Page


def watch(say: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> None:
    """Returns in the process that is to do the work: a new one, and again a new one when that has died. The process
    that called it waits, and ends with the work's exit status. Where that is not the command itself, but a test or
    somebody's program, it does the work, and nobody waits.

    Args:
        say: told what became of a worker.
        environment: ours.

    Raises:
        CandidateError: in the process that waits: the worker died too often for one reason.
        KeyboardInterrupt: there: it was interrupted, and the worker did not end in order.
    """
    if not (signals.is_installed() and _can_fork()) or environment.get(UNWATCHED):
        return
    deaths, ears = Deaths("the worker"), signals.Ears(signal.SIGCHLD)
    us, interrupted = os.getpid(), 0
    try:
        while True:
            worker = _start(ears)
            if worker is None:
                return
            ended, interrupted = _wait(worker, ears)
            os.close(worker.leash)
            _end_with(ended, worker.page, interrupted)
            reason = worker.page.reason or (signal.Signals(-ended).name if ended < 0 else "")
            said = deaths.one_more(reason)
            _begin_line()
            if deaths.too_many:
                raise CandidateError(f"{said}; what was scored is kept, and the same command goes on")
            say(f"note: {said}")
    except BaseException:
        if os.getpid() == us:  # else it is a worker's, interrupted as it began
            ears.give_back(received=interrupted > 0)
        raise


def _can_fork() -> bool:
    """Whether what is loaded goes on in a fork: macOS' own libraries do not."""
    return hasattr(os, "fork") and sys.platform != "darwin"


def _start(ears: signals.Ears) -> _Forked | None:
    """Starts a worker; None in it."""
    signals.flush()  # else both would print what waits there
    page, us = signals.Page(), os.getpid()
    heard, leash = os.pipe()
    # until the new process takes them as the command does, they would end it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        pid = fork()
        if not pid:
            os.close(leash)
            _die_with(us)
            ears.begin_again(heard, page)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if not pid:
        return None
    os.close(heard)
    return _Forked(pid, leash, page)


def _die_with(parent: int) -> None:
    """Has the system end this process when the one that started it is gone; elsewhere the leash ends it in order."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(worker: _Forked, ears: signals.Ears) -> tuple[int, int]:
    """Waits for a worker's end, and hands on how often this process is interrupted meanwhile.

    Returns:
        The exit status, negative for a signal, and how often.
    """
    interrupted = killed = 0
    deadline = None
    while True:
        pid, status = os.waitpid(worker.pid, os.WNOHANG)
        if pid:
            # what ended it may have come here too, and not be counted yet
            return os.waitstatus_to_exitcode(status), signals.counted(interrupted, ears.wait(0))
        now = time.monotonic()
        if deadline is not None and now >= deadline and not killed and (interrupted > 1 or worker.page.at_work):
            os.kill(worker.pid, killed := signal.SIGKILL)
        numbers = ears.wait(None if deadline is None else min(_LOOKS, max(0.05, deadline - now)))
        count = signals.counted(interrupted, numbers)
        if count > interrupted:
            interrupted = count
            deadline = time.monotonic() + (_SOON if count > 1 else signals.HANDS_BACK + SPARE)
            with contextlib.suppress(OSError):  # it has just ended
                os.write(worker.leash, bytes(number for number in numbers if number in signals.SIGNALS))
        if signal.SIGHUP in numbers:
            signals.leave_terminal()


def _end_with(ended: int, page: signals.Page, interrupted: int) -> None:
    """Ends this process as the worker ended; returns where that died and may be started again.

    Raises:
        KeyboardInterrupt: it was interrupted, and there is still something to say or to do.
    """
    if page.status is not None:  # whatever a library made of the end of the process
        _exit(page.status)
    if interrupted > 1 or ended == signals.AT_ONCE:
        if ended < 0:
            signals.end_now()
        _exit(ended)
    if interrupted:
        if ended >= 0 and not page.reason:
            signals.said()
        raise KeyboardInterrupt
    if ended >= 0 and not page.reason:
        _exit(ended)


def _exit(status: int) -> NoReturn:
    signals.over(status)
    signals.flush()
    os._exit(status)


def _begin_line() -> None:
    """On a terminal: below what a worker had drawn there."""
    if os.isatty(1):
        os.write(1, signals.SHOW_CURSOR + b"\n")
