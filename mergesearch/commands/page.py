"""The page of a run: `mergesearch report RUN --html FILE`, `mergesearch watch RUN --html`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mergesearch.commands.story import kept_report
from mergesearch.commands.winner import sentence
from mergesearch.results.loading import Run, run_of
from mergesearch.results.page import Subject, write
from mergesearch.results.states import RUNNING, WAITING
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.importances import importances
from mergesearch.search.store import RunFolder, open_run

# where a study notes which kinds of tensors its models have
ANATOMY = "anatomy"


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
        anatomy=store.noted(study, ANATOMY) or {},
        at_work=is_at_work(run),
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
    write(out, subjects, refresh if subjects[0].at_work else None)
    return subjects[0]


def _verdict(run: Run) -> str:
    winner = run.best()
    if winner is None:
        return "Nothing can be said yet: no candidate that may win has been scored."
    return sentence(run, winner)


def is_at_work(run: Run) -> bool:
    """Whether a trial is under way, or the run has budget left that somebody may be at."""
    return any(record.state in (RUNNING, WAITING) for record in run.records)


def _ignore(_: Any) -> None:
    """Stands in for a listener nobody gave."""
