"""How a run goes, told while it goes: a bar on a terminal, and a line for each trial everywhere. And how it is
interrupted."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mergesearch.config import Config
from mergesearch.results.states import ENDED
from mergesearch.search.strategies import registered

if TYPE_CHECKING:
    from mergesearch.results.record import Record


class RunProgress:
    """A context in which the bar is shown.

    Args:
        config: the run's configuration; it says how many trials there will be.
        console: where to print.
    """

    def __init__(self, config: Config, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._console = console
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        known = registered()
        more = (known[name].cost(config, ()).trials for name in config.search.strategies)
        self._total = config.search.trials + sum(more)
        self._task = self._bar.add_task("starting", total=self._total)
        self._ended = 0
        self._best: Record | None = None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, records: Sequence[Record]) -> None:
        """Counts the trials that an earlier start has ended."""
        for record in records:
            self._count(record)
        if self._ended:
            self.say(f"going on after {self._ended} trials")

    def started(self, record: Record) -> None:
        """A trial begins."""
        text = f"trial {record.number} {record.method}"
        if record.name:  # the first ones have no objective, and so no line, until all parents are scored
            self.say(text)
        else:
            self._bar.update(self._task, description=text)

    def finished(self, record: Record) -> None:
        """A trial has ended."""
        self._count(record)
        self._console.print(self._line(record), markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _count(self, record: Record) -> None:
        if record.state not in ENDED:
            return
        self._ended += 1
        self._bar.update(self._task, completed=self._ended)
        if record.objective is None or record.infeasible:
            return
        if self._best is None or record.objective > (self._best.objective or 0.0):
            self._best = record

    def _line(self, record: Record) -> str:
        head = f"[{self._ended}/{self._total}] trial {record.number} {record.method}"
        if record.stopped:
            return f"{head}: stopped {record.stopped} ({record.seconds or 0.0:.1f} s)"
        if record.objective is None:
            return f"{head}: failed: {record.error}"
        best = f"best {self._best.objective:.4f}, trial {self._best.number}" if self._best else ""
        broken = f" but {record.infeasible}" if record.infeasible else ""
        return f"{head}: {record.objective:.4f}{broken} ({best}; {record.seconds or 0.0:.1f} s)"


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A cluster's SIGTERM ends a run as cleanly as Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
