"""How the command is interrupted, from its first moment to its last: SIGINT, SIGTERM and SIGHUP alike.

The first of them raises KeyboardInterrupt where the work stands and is remembered, whatever a library on the way makes
of that. The second ends the process at once, with what there is to say about going on. A terminal that is closed sends
SIGHUP more than once and is gone by then: SIGHUP counts as the first only, and the lines go nowhere.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import stat
import sys
import threading
from dataclasses import dataclass, field

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# the exit status of an interruption that waits for nothing
AT_ONCE = 130
_SHOW_CURSOR = b"\x1b[?25h"


@dataclass
class _Interruption:
    """What is known of it in this process.

    Attributes:
        line: what is to be said of it.
        told: whether that was said.
        received: whether there was one.
        status: of the work, once that is over.
        installed: whether the signals are taken here.
        ending: held by whoever ends the process.
    """

    line: str = "interrupted"
    told: bool = False
    received: bool = False
    status: int | None = None
    installed: bool = False
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
    for each in SIGNALS:
        # who starts it in the background, or under nohup, may have them ignored
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, _handle)
    os.register_at_fork(after_in_child=_forget)


def _hear() -> None:
    """C code may run for minutes before Python's own handlers get their turn: a thread sees a second signal at once."""
    heard, told = os.pipe()
    # Thread.start would wait for ever for a thread that has no memory to begin with
    _thread.start_new_thread(_listen, (heard,))
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)


def is_interrupted() -> bool:
    """Whether one of the signals has come."""
    return _interruption.received


def check() -> None:
    """Raises KeyboardInterrupt where one of the signals has come and somebody has swallowed what it raised."""
    if _interruption.received:
        raise KeyboardInterrupt


def how_to_go_on(line: str) -> None:
    """What is to be said of an interruption from here on, in one line."""
    _interruption.line = line


def line() -> str:
    """That line."""
    return _interruption.line


def said() -> None:
    """The line was said, and need not be said again."""
    _interruption.told = True


def over(status: int) -> None:
    """The work is done: whatever comes while the process ends does not change its exit status."""
    _interruption.status = status


def end_now(status: int = AT_ONCE) -> None:
    """Ends the process without waiting for anything, having said how to go on."""
    if not _interruption.ending.acquire(blocking=False):
        return
    if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
    if not _interruption.told:
        os.write(2, f"error: {_interruption.line}\n".encode(errors="replace"))
    os._exit(status)


def _handle(number: int, _: object) -> None:
    if _interruption.status is not None:
        os._exit(_interruption.status)
    if number == signal.SIGHUP:
        _leave_terminal()
        if _interruption.received:
            return
    if _interruption.received:
        end_now()
    _interruption.received = True
    raise KeyboardInterrupt


def _leave_terminal() -> None:
    """What is still said after a terminal was closed goes nowhere: writing to it is an error and would end the work."""
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # a terminal that is gone no longer says that it is one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def _listen(heard: int) -> None:
    count = 0
    while got := os.read(heard, 64):
        count += sum(1 for number in got if number in SIGNALS and not (count and number == signal.SIGHUP))
        if count > 1 and _interruption.status is None:
            end_now()


def _forget() -> None:
    """In a process that was forked: it is not the command, and its parent decides when it ends."""
    signal.set_wakeup_fd(-1)
    for each, usual in zip(SIGNALS, (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL), strict=True):
        if signal.getsignal(each) is _handle:
            signal.signal(each, usual)


def flush() -> None:
    """Hands on what was printed; nothing else is waited for."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # whoever read it is gone
