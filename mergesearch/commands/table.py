"""`mergesearch table`: the result table of a run, and what the run has to say beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesearch.commands.story import kept_report
from mergesearch.errors import UserError, unknown
from mergesearch.results import frames
from mergesearch.results.loading import Run, load_run
from mergesearch.results.table import FORMATS, TEXT, render, write
from mergesearch.results.workers import failures


def show(run: Run, form: str = TEXT, top: int | None = None, sort: str = "rank") -> list[Any]:
    """What rich prints, piece by piece: the table, and as text the run's lines after it.

    The table as text fits the width that rich has; `str` of it is as wide as need be, for a pipe.

    Raises:
        UserError: there is no such format or column.
    """
    rendered = render(run.records, form, top, sort, run.margins() if form == TEXT else None)
    return [rendered, *run.words] if form == TEXT else [rendered]


def brief(run: Run) -> list[str]:
    """A run at a moment in a few lines, for who watches it: who is at work, the best so far, what failed, what it has
    cost and what is left."""
    best = run.best()
    so_far = []
    if best is not None:
        name = f" {best.name}" if best.name else f" {best.method}"
        so_far = [f"best so far: {best.objective:.4f}, trial {best.number}{name}"]
    ends = [line for line in run.words if line.partition(":")[0] in ("cost", "kept", "left")]
    return [*run.crew.words(), *so_far, *failures(run.records), *ends]


def data_of(path: Path, what: str, form: str) -> bytes:
    """Documents or the report of a run as data; trials are the table.

    Args:
        path: the run folder.
        what: one of `results.frames.FRAMES` but trials.
        form: one of `results.frames.FORMATS`.

    Raises:
        UserError: no such run, frame or format, or no report yet.
    """
    if what not in frames.FRAMES:
        raise unknown("frame", what, frames.FRAMES, "--of")
    run = load_run(path)
    if what == frames.DOCUMENTS:
        return frames.as_bytes(frames.documents(run.folder, run.records), form)
    held = kept_report(run.folder)
    if held is None:
        raise UserError(f"{path} has no report on the holdout yet: `mergesearch report {path}` makes it")
    return frames.as_bytes(frames.report(held), form)


def write_data(path: Path, out: Path, what: str, form: str) -> None:
    """Writes what `data_of` gives to a file; one that is there is replaced.

    Raises:
        UserError: as for `data_of`, or the file cannot be written.
    """
    frames.write_bytes(data_of(path, what, form), out)


def form_of(file: Path) -> str:
    """The format that a file's ending names; text for every other ending."""
    ending = file.suffix.removeprefix(".").lower()
    return ending if ending in FORMATS else TEXT


def write_table(path: Path, out: Path, form: str = TEXT, top: int | None = None, sort: str = "rank") -> None:
    """Writes what `show` gives, or Parquet, to a file.

    Args:
        path: the run folder.
        out: the file; one that is there is replaced.
        form: one of `results.table.FORMATS`.
        top: only the first rows.
        sort: a column's name.

    Raises:
        UserError: no such run, format or column, or the file cannot be written.
    """
    run = load_run(path)
    write(run.records, out, form, top, sort, run.words, run.margins())
