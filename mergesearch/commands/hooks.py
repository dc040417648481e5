"""`on_best` and `on_end`: a command of the user's, run with the news in its environment."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mergesearch import signals
from mergesearch.commands.track import tell_verdict
from mergesearch.config import Config
from mergesearch.errors import CutError, StorageError, UserError, without_passwords
from mergesearch.results.record import Record

BEST, END = "best", "end"
# seconds that such a command may take
LONGEST = 60.0


def news(config: Config, event: str, record: Record | None, verdict: str, status: int = 0) -> dict[str, str]:
    """What such a command finds in its environment.

    Args:
        config: of the run.
        event: `BEST` or `END`.
        record: the best candidate; None where there is none.
        verdict: in a sentence.
        status: that the run ends with.
    """
    found = {"EVENT": event, "NAME": config.name, "RUN": str(config.folder.absolute()), "VERDICT": verdict}
    if record is not None:
        found |= {"TRIAL": str(record.number), "METHOD": record.method, "OBJECTIVE": f"{record.objective}"}
    if event == END:
        found["STATUS"] = str(status)
    return {f"MERGESEARCH_{key}": value for key, value in found.items()}


def run_hook(key: str, command: str, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Runs a command by the shell, and says so where it fails, by its key: it may hold secrets. The search goes on."""
    try:
        done = subprocess.run(
            command, shell=True, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        say(f"note: {key} took more than {LONGEST:.0f} s and was ended")
        return
    except OSError as error:
        say(f"note: {key} could not be run ({error.strerror})")
        return
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        say(f"note: {key} ended with status {done.returncode}{f' ({last[0]})' if last else ''}")


class BestHook:
    """Runs `on_best` whenever a candidate of the search is the best of all so far, beside the search, one command at a
    time; of news that come meanwhile the last is told.

    Args:
        config: of the run.
        best: the best candidate of all workers by now; None where there is none.
        say: told where the command fails.
    """

    def __init__(self, config: Config, best: Callable[[], Record | None], say: Callable[[str], None]):
        self._config, self._best, self._say = config, best, say
        self._waiting: Record | None = None
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None

    def finished(self, record: Record) -> None:
        """A trial has ended."""
        if self._config.on_best is None or record.name is not None or record.objective is None:
            return
        best = self._best()
        if best is None or best.number != record.number:
            return
        with self._lock:
            self._waiting = record
            if self._running is None:
                self._running = threading.Thread(target=self._tell, name="on_best")
                self._running.start()

    def wait(self) -> None:
        """Returns once everything is told."""
        running = self._running
        if running is not None:
            running.join()

    def _tell(self) -> None:
        while True:
            with self._lock:
                record, self._waiting = self._waiting, None
                if record is None:
                    self._running = None
                    return
            verdict = f"trial {record.number} ({record.method}) has {record.objective:.4f} on the search documents"
            run_hook("on_best", self._config.on_best or "", news(self._config, BEST, record, verdict), self._say)


@contextmanager
def told_at_end(
    config: Config, best: Callable[[], tuple[Record | None, str]], say: Callable[[str], None]
) -> Iterator[None]:
    """A context at whose end `on_end` is run, however it ends, and trackers are told what the run came to.

    Args:
        config: of the run.
        best: the best candidate and the verdict, once the run has ended as it should.
        say: told where the command fails.
    """
    try:
        yield
    except BaseException as error:
        if config.on_end is None:
            raise
        status = getattr(error, "exit_code", 2 if isinstance(error, UserError) else 1)
        verdict = str(error) if isinstance(error, Exception | StorageError | CutError) else ""
        verdict = verdict if verdict and verdict != str(status) else signals.line()
        run_hook("on_end", config.on_end, news(config, END, None, without_passwords(verdict), status), say)
        raise
    tell_end(config, best, say)


def tell_end(config: Config, best: Callable[[], tuple[Record | None, str]], say: Callable[[str], None]) -> None:
    """Runs `on_end`, and tells trackers what the run came to; arguments as for `told_at_end`."""
    if config.on_end is None and not config.track:
        return
    record, verdict = best()
    tell_verdict(config, verdict, say)
    if config.on_end is not None:
        run_hook("on_end", config.on_end, news(config, END, record, verdict), say)
