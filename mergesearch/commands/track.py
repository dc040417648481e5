"""`track:` in a configuration: trials told to trackers as they end, beside the search, and the verdict at its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.results.loading import load_run
from mergesearch.results.parameters import parameters_of
from mergesearch.results.record import Record
from mergesearch.results.states import ENDED
from mergesearch.results.trackers import TrackedRow, Tracker, check_installed, tracker_of
from mergesearch.search.store import RunFolder, write_atomically

# in the run folder: which trials each tracker has
TOLD = "tracked.json"


def check_trackers(config: Config) -> None:
    """`UserError` where a tracker is not installed, or is named twice."""
    for each in config.track:
        check_installed(each)
    names = [each.to for each in config.track]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"track names {twice} twice: leave one of them out")


class Tracking:
    """Tells trials to the trackers of a configuration, one after another, beside the search.

    A tracker that cannot be reached stops nothing: it is said, once, and gets what it has missed when the run ends, or
    is taken up again. Which trials each has stands in the run folder, so that none is told twice, by no worker.

    Args:
        config: of the run.
        folder: the run folder.
        say: told where a tracker fails.
    """

    def __init__(self, config: Config, folder: RunFolder, say: Callable[[str], None]):
        self._config, self._folder, self._say = config, folder, say
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        self._queue: SimpleQueue[Record | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def finished(self, record: Record) -> None:
        """A trial has ended."""
        if not self._config.track:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="track", daemon=True)
            self._thread.start()
        self._queue.put(record)

    def wait(self) -> None:
        """Returns once everything is told."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def tell(self, records: Sequence[Record], verdict: str | None = None) -> None:
        """Tells what has ended of some trials and was not told yet, and what the run came to."""
        ended = [record for record in records if record.state in ENDED]
        for each in self._config.track:
            if each.to in self._failed:  # it gets what it misses when the run ends
                continue
            try:
                with self._folder.lock("track"):
                    told = self._told()
                    for record in ended:
                        if record.number not in told.get(each.to, []):
                            self._tracker(each.to).add(row_of(record))
                            told.setdefault(each.to, []).append(record.number)
                            write_atomically(self._folder.path / TOLD, json.dumps(told))
                    if verdict is not None:
                        self._tracker(each.to).verdict(verdict)
            except Exception as error:  # of a library that talks to a server
                reason = " ".join(str(error).split())[:200]
                self._say(f"note: {each.to} was not told ({type(error).__name__}: {reason}); the search goes on")
                self._failed.add(each.to)

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            self.tell([record])

    def _tracker(self, name: str) -> Tracker:
        if name not in self._trackers:
            (config,) = (each for each in self._config.track if each.to == name)
            self._trackers[name] = tracker_of(config, self._config.name, self._folder.path)
        return self._trackers[name]

    def _told(self) -> dict[str, list[int]]:
        with suppress(OSError, ValueError):
            found = json.loads((self._folder.path / TOLD).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        return {}


def tell_verdict(config: Config, sentence: str, say: Callable[[str], None]) -> None:
    """Tells every tracker what the run came to, and what trials it has missed."""
    if config.track:
        Tracking(config, RunFolder(config.folder), say).tell(load_run(config.folder).records, sentence)


def row_of(record: Record) -> TrackedRow:
    """A trial as trackers keep it."""
    numbers, words = parameters_of(record)
    figures = {f"{task} {score.metric}": score.value for task, score in record.scores.items()}
    if record.objective is not None:
        figures = {"objective": record.objective, **figures}
    said = {
        "strategy": record.strategy, "recipe": record.recipe_id, "error": record.error, "stopped": record.stopped,
        "infeasible": record.infeasible,
    }  # fmt: skip
    return TrackedRow(
        number=record.number,
        name=record.name or record.method,
        state=record.state,
        figures=figures,
        parameters={**numbers, **words},
        words={name: text for name, text in said.items() if text},
    )
