"""How far a soup is, kept for other hosts while it is learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from mergesearch.search.store import RunFolder

# seconds of learning that another host may have to do again
KEPT_EVERY = 30.0


class LearningFiles:
    """The files of one trial's soup: the state, and one for each fold where it is learned in folds.

    Args:
        folder: the run's.
        number: the trial's.
        clock: seconds that only grow.
    """

    def __init__(self, folder: RunFolder, number: int, clock: Callable[[], float] = time.monotonic):
        self._folder, self._clock, self._next = folder, clock, clock() + KEPT_EVERY
        self.path: Path = folder.learning(number)
        self._kept: dict[Path, int] = {}  # when each was last written that is kept

    def fetch(self) -> None:
        """Gets what another host kept, which may be further than what is here."""
        if self._folder.artifacts is not None:
            for path in self._names():
                if not self._folder.fetch(path) and path != self.path:
                    break

    def keep(self, at_once: bool = False) -> None:
        """Keeps what has changed, every `KEPT_EVERY` seconds.

        Raises:
            OSError: it could not be kept.
        """
        if self._folder.artifacts is None or not (at_once or self._clock() >= self._next):
            return
        self._next = self._clock() + KEPT_EVERY
        for path in self._names():
            if path.is_file() and self._kept.get(path) != (written := path.stat().st_mtime_ns):
                self._folder.keep(path)
                self._kept[path] = written
            elif not path.is_file() and path != self.path:
                break

    def _names(self) -> Iterator[Path]:
        yield self.path
        for number in count():
            yield self.path.with_suffix(f".fold{number}")


__all__ = ["LearningFiles"]
