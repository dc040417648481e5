"""How the command is interrupted, from its first moment to its last: SIGINT, SIGTERM and SIGHUP alike.

The first of them raises KeyboardInterrupt where the work stands and is remembered, whatever a library on the way makes
of that. The second ends the process at once, with what there is to say about going on. So does the first where the work
does not end in order within `HANDS_BACK` seconds. A terminal that is closed sends SIGHUP more than once and is gone by
then: SIGHUP counts as the first only, and the lines go nowhere.

A process that was forked to do the work (`commands.watching`) is sent some of these signals together with the one that
waits for it, and some not. The one that waits hands on how many it has had, and the larger of both counts holds: a
signal that reaches both is one.
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# the exit status of an interruption that waits for nothing
AT_ONCE = 130
# seconds that the work has after the first signal to end in order
HANDS_BACK = 10.0
# seconds between looks whether the work has begun that is to end
_LOOKS = 0.5
# how the thread that hears of a signal elsewhere interrupts the main one; whoever else gets it takes no notice
_HANDED_ON = signal.SIGURG
SHOW_CURSOR = b"\x1b[?25h"


class Page:
    """What a process that does the work says to the one that waits for it: memory of both, so that it still stands
    there when the first was killed."""

    _AT_WORK, _OVER, _STATUS, _REASON = range(4)

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def at_work(self) -> bool:
        """Whether it is at what has to be handed back."""
        return bool(self._bytes[self._AT_WORK])

    @at_work.setter
    def at_work(self, value: bool) -> None:
        self._bytes[self._AT_WORK] = value

    @property
    def status(self) -> int | None:
        """Of its work, once that is over."""
        return self._bytes[self._STATUS] if self._bytes[self._OVER] else None

    @status.setter
    def status(self, value: int) -> None:
        self._bytes[self._STATUS] = value
        self._bytes[self._OVER] = True

    @property
    def reason(self) -> str:
        """Why it ends itself to be started again; empty where it does not."""
        return self._bytes[self._REASON :].split(b"\0")[0].decode(errors="ignore")

    @reason.setter
    def reason(self, value: str) -> None:
        text = value.encode(errors="replace")[: mmap.PAGESIZE - self._REASON - 1]
        self._bytes[self._REASON : self._REASON + len(text)] = text


@dataclass
class _Interruption:
    """What is known of it in this process.

    Attributes:
        line: what is to be said of it.
        told: whether that was said.
        received: whether there was one.
        elsewhere: whether all that is known of it is that the process that waits for this one has had it.
        status: of the work, once that is over.
        at_work: whether it is to end in order within `HANDS_BACK`.
        installed: whether the signals are taken here.
        page: read by the process that waits for this one; None where none does.
        ending: held by whoever ends the process.
    """

    line: str = "interrupted"
    told: bool = False
    received: bool = False
    elsewhere: bool = False
    status: int | None = None
    at_work: bool = False
    installed: bool = False
    page: Page | None = None
    ending: threading.Lock = field(default_factory=threading.Lock)


_interruption = _Interruption()


def install() -> None:
    """Takes these signals from here on; in the main thread of the command, once."""
    if _interruption.installed or threading.current_thread() is not threading.main_thread():
        return
    _interruption.installed = True
    # with no file or no memory left the command goes on without it, to the sentence that says so
    with contextlib.suppress(OSError, RuntimeError):
        _hear()
    _take(_handle)
    os.register_at_fork(after_in_child=_forget)


def _take(handler: Callable[[int, Any], None]) -> None:
    for each in SIGNALS:
        # who starts it in the background, or under nohup, may have them ignored
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, handler)


def _hear(leash: int | None = None) -> None:
    """C code may run for minutes before Python's own handlers get their turn: a thread sees a second signal at once."""
    heard, told = os.pipe()
    # Thread.start would wait for ever for a thread that has no memory to begin with
    _thread.start_new_thread(_listen, (heard, leash))
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def is_installed() -> bool:
    """Whether the signals are taken here: this is the command itself, or does its work."""
    return _interruption.installed


def is_interrupted() -> bool:
    """Whether one of the signals has come."""
    return _interruption.received


def check() -> None:
    """Raises KeyboardInterrupt where one of the signals has come and somebody has swallowed what it raised."""
    if _interruption.received:
        raise KeyboardInterrupt


def how_to_go_on(line: str) -> None:
    """What is to be said of an interruption from here on, in one line."""
    _interruption.line, _interruption.told = line, False


def line() -> str:
    """That line."""
    return _interruption.line


def said() -> None:
    """The line was said, and need not be said again."""
    _interruption.told = True


def is_said() -> bool:
    """Whether it was."""
    return _interruption.told


def over(status: int) -> None:
    """The work is done: whatever comes while the process ends does not change its exit status."""
    _interruption.status = status
    if _interruption.page is not None:
        _interruption.page.status = status


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """A context that an interruption leaves in order within `HANDS_BACK` seconds; else it ends the process."""
    _set_at_work(True)
    try:
        yield
    finally:
        _set_at_work(False)


def _set_at_work(value: bool) -> None:
    _interruption.at_work = value
    if _interruption.page is not None:
        _interruption.page.at_work = value


def leave_word(reason: str) -> None:
    """Says to the process that waits for this one, if there is one, why this one ends: it is to start another."""
    if _interruption.page is not None:
        _interruption.page.reason = reason
        said()


def end_now(status: int = AT_ONCE) -> None:
    """Ends the process without waiting for anything, having said how to go on."""
    if not _interruption.ending.acquire(blocking=False):
        return
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    if not _interruption.told:
        os.write(2, f"error: {_interruption.line}\n".encode(errors="replace"))
    os._exit(status)


def _handle(number: int, _: object) -> None:
    if _interruption.status is not None:
        os._exit(_interruption.status)
    if number == signal.SIGHUP:
        leave_terminal()
        if _interruption.received:
            return
    elsewhere, _interruption.elsewhere = _interruption.elsewhere, False
    if _interruption.received:
        if elsewhere:  # the same one, which has reached both
            return
        end_now()
    _interruption.received = True
    raise KeyboardInterrupt


def _handle_handed_on(number: int, _: object) -> None:
    if _interruption.elsewhere and not _interruption.received and _interruption.status is None:
        _interruption.received = True
        raise KeyboardInterrupt


def leave_terminal() -> None:
    """What is still said after a terminal was closed goes nowhere: writing to it is an error and would end the work."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a terminal that is gone no longer says that it is one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def counted(count: int, numbers: bytes) -> int:
    """How many signals there were, with some more: their numbers, a byte each."""
    for number in numbers:
        count += number in SIGNALS and not (count and number == signal.SIGHUP)
    return count


def _listen(heard: int, leash: int | None) -> None:
    """Counts the signals of this process, and those that come over the leash from the one that waits for it."""
    mine = elsewhere = 0
    first: float | None = None
    open_ones = [heard] if leash is None else [heard, leash]
    while True:
        wait = None if first is None else max(_LOOKS, first + HANDS_BACK - time.monotonic())
        ready = select.select(open_ones, [], [], wait)[0]
        if heard in ready:
            mine = counted(mine, os.read(heard, 64))
        if leash in ready:
            got = os.read(leash, 64)
            elsewhere = counted(elsewhere, got)
            if signal.SIGHUP in got:  # the system says it to one process alone
                leave_terminal()
            if not got:  # whoever waits for this one is gone without a word
                open_ones.remove(leash)
                elsewhere = max(1, elsewhere)
        count = max(mine, elsewhere)
        if not count or _interruption.status is not None:
            continue
        if count > 1:
            end_now()
        if first is None:
            first = time.monotonic()
            if not mine:
                _interruption.elsewhere = True
                signal.pthread_kill(threading.main_thread().ident or 0, _HANDED_ON)
        elif _interruption.at_work and time.monotonic() - first >= HANDS_BACK:
            end_now(1)


def _forget() -> None:
    """In a process that was forked: it is not the command, and its parent decides when it ends."""
    signal.set_wakeup_fd(-1)
    _interruption.page = None
    for each, usual in zip(SIGNALS, (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL), strict=True):
        if signal.getsignal(each) in (_handle, _only_heard):
            signal.signal(each, usual)


# --- one that works, one that waits ---


class Ears:
    """Takes the signals of a process that waits for another one: they interrupt nothing, and are counted when it looks.

    Args:
        more: signals that end a wait too.
    """

    def __init__(self, *more: signal.Signals):
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        self._usual = {each: signal.signal(each, _only_heard) for each in more}
        _take(_only_heard)

    def wait(self, seconds: float | None) -> bytes:
        """The numbers of the signals that come within so many seconds (None: for ever); returns at the first."""
        return os.read(self._heard, 64) if select.select([self._heard], [], [], seconds)[0] else b""

    def give_back(self, received: bool) -> None:
        """They interrupt again, as before.

        Args:
            received: whether the first of them has come.
        """
        _interruption.received = _interruption.received or received
        _take(_handle)
        for each, usual in self._usual.items():
            signal.signal(each, usual)
        signal.set_wakeup_fd(self._before)
        os.close(self._heard)
        os.close(self._told)

    def begin_again(self, leash: int, page: Page) -> None:
        """In a process that was forked meanwhile to do the work: takes the signals as the command does.

        Args:
            leash: where the number of each signal comes that the process has had that waits for this one, and the end
                when it is gone.
            page: what that one reads.
        """
        os.close(self._heard)
        os.close(self._told)
        for each, usual in self._usual.items():
            signal.signal(each, usual)
        global _interruption
        _interruption = _Interruption(_interruption.line, installed=True, page=page)
        signal.signal(_HANDED_ON, _handle_handed_on)
        with contextlib.suppress(OSError, RuntimeError):
            _hear(leash)
        _take(_handle)


def _only_heard(number: int, _: object) -> None:
    """Stands for what else a signal does: it is read from the wake-up descriptor."""


def flush() -> None:
    """Hands on what was printed; nothing else is waited for."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # whoever read it is gone
