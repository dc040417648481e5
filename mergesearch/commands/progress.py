"""How a run goes, told while it goes: a view on a terminal, and a line for each trial everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from mergesearch import signals
from mergesearch.commands.live import View, render
from mergesearch.config import Config
from mergesearch.results.record import Record, record_of
from mergesearch.results.states import ENDED
from mergesearch.search.estimate import estimate
from mergesearch.search.history import History

if TYPE_CHECKING:
    from mergesearch.evaluate.asking import Asked
    from mergesearch.search.soup.learning import LearningStep

# the view is drawn so often a second; more is no use to a reader, and costs what is searched with
DRAWN = 2
# seconds after which what is left is estimated again while a trial goes on, and the study is read again while it learns
ESTIMATED, READ = 2.0, 5.0
# an estimate, with reading the study, takes one part of the time in so many
SHARE = 200
# where lines are all there is, a trial that goes on says so after so many seconds
STILL = 60.0


class RunProgress:
    """A context in which a run is shown.

    Args:
        config: the run's configuration.
        console: where to print.
        clock: seconds that only grow.
    """

    def __init__(self, config: Config, console: Console, clock: Callable[[], float] = time.monotonic):
        self._config, self._console, self._clock = config, console, clock
        self._view = View(objective_known=False)
        self._live: Live | None = None
        if console.is_terminal:
            # what is logged or printed meanwhile goes above the view
            self._live = Live(
                console=console,
                get_renderable=lambda: render(self._view, self._clock(), console.width),
                refresh_per_second=DRAWN,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
        self._read: Callable[[], History] | None = None
        self._at_work: Callable[[], int | None] = lambda: None
        self._was_at: int | None = None  # when the study was read
        self._history: History | None = None
        self._shown: set[int] = set()
        self._settled: set[int] = set()  # of all workers, as far as the study was read
        self._printed = clock()
        self._estimated = self._was_read = -READ
        self._cost, self._stale = 0.0, False

    def __enter__(self) -> RunProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the view away."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """What is being done now, or what a reader should know."""
        signals.check()
        self._view.doing = text
        if self._live is None or text.startswith("note: "):
            self._print(text)

    def begin(
        self, history: Callable[[], History], records: Sequence[Record], at_work: Callable[[], int | None]
    ) -> None:
        """The search begins, or goes on after the trials of an earlier start.

        Args:
            history: reads the run so far.
            records: its trials.
            at_work: the number of the trial that this worker is at; None while it is at none.
        """
        self._read, self._at_work = history, at_work
        for record in records:
            if record.state in ENDED or record.scores:
                self._count(record)
        self._reckon(again=True)
        if self._shown:
            self._print(f"going on after {len(self._shown)} trials")

    # --- what the search tells ---

    def started(self, record: Record) -> None:
        """A trial has its recipe, and is built and scored."""
        signals.check()
        view = self._view
        view.stage, view.trial = record.strategy or "", f"trial {record.number} {record.method}"
        view.doing, view.begun = "merging", None
        view.documents = view.block = view.last = 0
        self._reckon(again=True)

    def scored(self, record: Record) -> None:
        """A trial was scored before the objective is known, which all parents' scores fix."""
        self._count(record)
        self._reckon(again=True)
        tasks = ", ".join(f"{task} {score.metric} {score.value:.4f}" for task, score in record.scores.items())
        self._print(f"{self._head(record)}: {tasks} ({self._seconds(record)})")

    def finished(self, record: Record) -> None:
        """A trial has ended."""
        known = record.number in self._shown
        self._count(record)
        self._reckon(again=True)
        if not known:
            self._print(self._line(record))

    def asked(self, asked: Asked) -> None:
        """The model has answered more of a trial's documents."""
        signals.check()
        view = self._view
        if view.begun is None:
            view.begun = self._clock()
        if asked.documents < view.last:  # a race asks block by block
            view.block += view.last
        view.last = asked.documents
        view.documents, view.of = view.block + asked.documents, max(view.each, asked.of)
        view.doing = ", ".join(asked.tasks[:2]) + (f" and {more} more" if (more := len(asked.tasks) - 2) > 0 else "")
        self._reckon()
        self._still(f"{view.trial}: {view.documents} of {view.of} documents")

    def learning(self, step: LearningStep) -> None:
        """A soup has been learned a step further."""
        signals.check()
        self._view.learns(step, self._running())
        self._reckon(learning=True)
        self._still(f"{self._view.trial}: {self._view.doing}")

    def doing(self) -> str:
        """What is done for the trial at work, in a few words."""
        view = self._view
        return f"{view.documents} of {view.of} documents" if view.of and view.begun is not None else view.doing

    # --- what is left ---

    def _reckon(self, again: bool = False, learning: bool = False) -> None:
        """What is left, from the study where a trial begins or ends, else by the time that has passed."""
        now = self._clock()
        self._stale = self._stale or again
        every = SHARE * self._cost if again else max(ESTIMATED, SHARE * self._cost)
        if self._read is None or now - self._estimated < every:
            return
        at_work = self._at_work()
        # what was read before this worker took a trial tells of who was at it before
        taken = at_work is not None and at_work != self._was_at
        if self._stale or self._history is None or taken or (learning and now - self._was_read > READ):
            self._history, self._was_read, self._stale = self._read(), now, False
            self._was_at = at_work
            self._settled = {trial.number for trial in self._history.trials if trial.state.settled}
            self._view.ended = len(self._shown | self._settled)
        self._estimated = now
        moment = datetime.now()
        rest = estimate(self._config, self._history, now=moment)
        self._view.note(self._history, rest, moment, now, at_work)
        self._cost = self._clock() - now

    def _running(self) -> Record | None:
        """The trial that this worker is at, before it has a recipe."""
        number = self._at_work()
        if number is None or self._read is None:
            return None
        if self._history is None or number >= len(self._history.trials):
            self._history = self._read()
        return record_of(self._history.trials[number], None)

    # --- lines ---

    def _count(self, record: Record) -> None:
        self._shown.add(record.number)
        self._view.ended = len(self._shown | self._settled)
        self._view.take(record)

    def _head(self, record: Record) -> str:
        return f"[{self._view.ended}/{self._view.total}] trial {record.number} {record.method}"

    def _seconds(self, record: Record) -> str:
        left = self._view.left(self._clock())
        about = f"; {left}" if left and self._live is None else ""
        return f"{record.seconds or 0.0:.1f} s{about}"

    def _line(self, record: Record) -> str:
        head = self._head(record)
        if record.stopped:
            return f"{head}: stopped {record.stopped} ({self._seconds(record)})"
        if record.objective is None:
            return f"{head}: failed: {record.error}"
        best, broken = self._view.best, f" but {record.infeasible}" if record.infeasible else ""
        # on a terminal the best stands in the view
        known = f"highest score {best.objective:.4f}, trial {best.number}; " if best and self._live is None else ""
        return f"{head}: {record.objective:.4f}{broken} ({known}{self._seconds(record)})"

    def _still(self, text: str) -> None:
        if self._live is None and self._clock() - self._printed > STILL:
            left = self._view.left(self._clock())
            self._print(f"{text}{f'; {left}' if left else ''}")

    def _print(self, text: str) -> None:
        self._printed = self._clock()
        self._console.print(text, markup=False, highlight=False, soft_wrap=self._live is None)
