"""The view of a run on a terminal: four lines that stay where they are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mergesearch.results.record import Record, record_of
from mergesearch.search.costs import duration
from mergesearch.search.estimate import Estimate
from mergesearch.search.history import History

if TYPE_CHECKING:
    from mergesearch.search.soup.learning import LearningStep

# columns that the stage may take of the first line
STAGE = 26


@dataclass
class View:
    """What is known of a run at a moment; the search writes it, and whoever draws it reads it.

    Attributes:
        stage: who proposed the trial, in words.
        trial: its number and method.
        doing: what is done for it: tasks, a step of learning.
        documents, of: how many of its documents are answered.
        each: how many documents a candidate has.
        block, last: of a trial that is asked block by block, the documents of the blocks before, and of this one.
        begun: when its first document was asked for.
        ended, total: trials that have ended, and that there will be, as far as one can tell.
        best, single: the trial with the highest score so far, and the single model. Tables rank by what is expected of
            a trial elsewhere, which takes too long to find for a view; so one may stand here that does not win.
        objective_known: whether the parents are scored.
        remaining: seconds that are left; None where nothing is known of them.
        worked: seconds that the run has been at work.
        shares: of these, what was spent on what, in words.
        at: the clock when `remaining` and `worked` were true.
    """

    stage: str = "starting"
    trial: str = ""
    doing: str = ""
    documents: int = 0
    of: int = 0
    each: int = 0
    block: int = 0
    last: int = 0
    begun: float | None = None
    ended: int = 0
    total: int = 0
    best: Record | None = None
    single: Record | None = None
    objective_known: bool = False
    remaining: float | None = None
    worked: float = 0.0
    shares: str = ""
    at: float = 0.0
    models: tuple[str, ...] = ()

    # --- what the search tells ---

    def take(self, record: Record) -> None:
        """A trial was scored."""
        if record.objective is None or record.infeasible:
            return
        if self.best is None or record.objective > (self.best.objective or 0.0):
            self.best = record
        if record.name in self.models and (self.single is None or record.objective > (self.single.objective or 0.0)):
            self.single = record

    def note(
        self, history: History, rest: Estimate | None, moment: datetime, now: float, at_work: int | None = None
    ) -> None:
        """Takes over what the study says, and what is left.

        Args:
            history: the run so far.
            rest: what it will still take; None where that is not known.
            moment, now: local time, and the clock.
            at_work: the number of the trial that this worker is at; None: it is at none.
        """
        self.models = tuple(history.config.models)
        self.objective_known = history.objective is not None
        self.each = history.documents_each
        self.total = len(history.trials) + (rest.trials if rest else 0)
        self.remaining, self.at = (rest.seconds if rest else None), now
        self.worked = 3600 * history.hours_with(at_work, moment)
        self.shares = shares(history)
        for trial in history.complete()[:1]:  # another worker's may be better
            self.take(record_of(trial, history.objective))

    def learns(self, step: LearningStep, record: Record | None) -> None:
        """A soup has been learned a step further; `record` is the trial that it will be of."""
        if record is not None:
            self.stage, self.trial = record.strategy or "", f"trial {record.number} {record.method}"
        self.documents, self.of, self.begun = 0, 0, None
        loss = "" if step.loss is None else f", loss {step.loss:.4f}"
        score = "" if step.score is None else f", best {step.score:.4f}"
        self.doing = f"step {step.step} of {step.of}{loss}{score}"

    # --- what a reader sees ---

    def left(self, now: float) -> str:
        """`about 2 min 10 s left`; empty where it is not known, and where nothing is left."""
        if not self.remaining or (self.total and self.ended >= self.total):
            return ""
        return f"about {duration(max(1.0, self.remaining - (now - self.at)))} left"

    def share(self, now: float) -> float:
        """Of the whole time, what has passed."""
        if self.remaining is None:
            return 0.0
        passed = now - self.at
        worked, rest = self.worked + passed, max(0.0, self.remaining - passed)
        return worked / max(worked + rest, 1e-9)


def shares(history: History) -> str:
    """`scoring 78 %, learning 20 %, merging 2 %`, of what trials have taken; empty before the first."""
    spent = {
        "scoring": sum(trial.score_seconds or 0.0 for trial in history.trials),
        "learning": sum(trial.learning_seconds or 0.0 for trial in history.trials),
        "merging": sum(trial.merge_seconds or 0.0 for trial in history.trials),
    }
    total = sum(spent.values())
    shown = [f"{name} {100 * seconds / total:.0f} %" for name, seconds in spent.items() if seconds] if total else []
    return ", ".join(shown)


def render(view: View, now: float, width: int) -> RenderableType:
    """The view as rich draws it: always four lines, none of them longer than the terminal is wide.

    Args:
        view: what is known.
        now: the clock.
        width: of the terminal.
    """
    lines = [_work(view, now), _best(view), _time(view, now)]
    return Group(_bar(view, now, width), *(_cut(line, width) for line in lines))


def _bar(view: View, now: float, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True, overflow="ellipsis", max_width=STAGE if width < 100 else 2 * STAGE)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=1.0, completed=view.share(now))
    count = f"{view.ended}/{view.total} trials" if view.total else ""
    line.add_row(Text(view.stage, style="bold"), bar, "  ".join(filter(None, (count, view.left(now)))))
    return line


def _work(view: View, now: float) -> str:
    if not view.trial:
        return view.doing
    text = f"{view.trial}: {view.doing}" if view.doing else view.trial
    if view.begun is None or not view.of:
        return text
    text += f", {view.documents} of {view.of} documents"
    seconds = now - view.begun
    return f"{text}, {view.documents / seconds:.0f} a second" if seconds > 1 and view.documents else text


def _best(view: View) -> str:
    if not view.objective_known or view.best is None:
        return "the objective is known once the base and all models are scored" if view.trial else ""
    best = f"highest score so far {view.best.objective:.4f} (trial {view.best.number} {view.best.method})"
    if view.single is None:
        return best
    return f"best single model {view.single.objective:.4f} ({view.single.name}), {best}"


def _time(view: View, now: float) -> str:
    if not view.trial:
        return ""
    at_work = f"{duration(view.worked + now - view.at)} at work"
    return f"{at_work}: {view.shares}" if view.shares else at_work


def _cut(line: str, width: int) -> Text:
    text = Text(line or " ", style="dim", no_wrap=True, overflow="ellipsis", end="\n")
    text.truncate(width, overflow="ellipsis")
    return text
