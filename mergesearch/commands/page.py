"""The page of a run: `mergesearch report RUN --html FILE`, `mergesearch watch RUN --html`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mergesearch.commands.examples import kept_examples
from mergesearch.commands.story import kept_report
from mergesearch.commands.winner import sentence
from mergesearch.results.loading import Run, load_run, run_of
from mergesearch.results.page.anatomy import ANATOMY
from mergesearch.results.page.build import write
from mergesearch.results.page.subject import Subject
from mergesearch.results.states import RUNNING, WAITING
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.importances import importances
from mergesearch.search.store import RunFolder, open_run

# of a run folder: the page that `watch` writes
PAGE = "page.html"


def subject_of(path: str | Path) -> Subject:
    """What a page says of a run, read from its folder.

    Raises:
        UserError: it is no run folder, or its storage cannot be read.
    """
    config, study = open_run(path)
    history = History(study, config)
    run = run_of(history, RunFolder(path))
    return Subject(
        run=run,
        trials=history.trials,
        verdict=_verdict(run),
        report=kept_report(run.folder),
        importances=[each.to_data() for each in importances(history, config.search.seed)],
        examples=kept_examples(run.folder),
        anatomy=store.noted(study, ANATOMY) or {},
        at_work=run.crew.living,
        over=is_over(run),
    )


def write_page(path: str | Path, out: Path, beside: Sequence[str | Path] = (), refresh: int | None = None) -> Subject:
    """Writes the page of a run, others beside it, as they stand; returns what it says of the run.

    Args:
        path: the run folder.
        out: the file; one that is there is replaced.
        beside: folders of further runs.
        refresh: after how many seconds a browser reads it anew; None for never.

    Raises:
        UserError: a folder is no run folder, or the file cannot be written.
    """
    subjects = [subject_of(each) for each in (path, *beside)]
    write(out, subjects, None if subjects[0].over else refresh)
    return subjects[0]


def _verdict(run: Run) -> str:
    winner = run.best()
    if winner is None:
        return "Nothing can be said yet: no candidate that may win has been scored."
    return sentence(run, winner)


def is_over(run: Run) -> bool:
    """Whether nothing is left to do: no trial is under way, and nothing of the budget is left that could be used."""
    under_way = any(record.state in (RUNNING, WAITING) for record in run.records)
    return bool(run.records) and not under_way and not any(line.startswith("left: ") for line in run.words)


def watch(
    path: str | Path,
    out: Path | None,
    every: float,
    show: Callable[[Run], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Looks at a run again and again until it is over.

    Args:
        path: the run folder.
        out: where its page is written each time; None for none.
        every: seconds from one look to the next.
        show: told the run at every look.
        wait: what waits so many seconds.

    Raises:
        UserError: it is no run folder, its storage cannot be read, or the page cannot be written.
    """
    while True:
        run = write_page(path, out, refresh=max(1, round(every))).run if out is not None else load_run(path)
        show(run)
        if is_over(run):
            return
        wait(every)
