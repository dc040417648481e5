"""`search.trial_timeout`: a candidate that takes too long is given up, also where the library that is at it never
returns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watchdog:
    """Watches one trial at a time from a thread of its own.

    Args:
        seconds: after which a trial that got no further is given up; None: never.
        expired: called then with the trial's number, in that thread; the one at work may be stuck for ever.
        clock: seconds that only grow.
    """

    def __init__(
        self, seconds: float | None, expired: Callable[[int], None], clock: Callable[[], float] = time.monotonic
    ):
        self._seconds, self._expired, self._clock = seconds, expired, clock
        self._changed = threading.Condition()
        self._number: int | None = None
        self._since = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, number: int) -> Iterator[None]:
        """A context in which a trial is at work."""
        if self._seconds is None:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), daemon=True, name="watchdog")
            self._thread.start()
        self._set(number)
        try:
            yield
        finally:
            self._set(None)

    def further(self) -> None:
        """The trial got further: its time begins anew."""
        with self._changed:
            self._since = self._clock()

    def _set(self, number: int | None) -> None:
        with self._changed:
            self._number, self._since = number, self._clock()
            self._changed.notify()

    def _watch(self, seconds: float) -> None:
        while True:
            with self._changed:
                number, left = self._number, self._since + seconds - self._clock()
                if number is None or left > 0:
                    self._changed.wait(None if number is None else left)
                    continue
                self._number = None
            self._expired(number)
