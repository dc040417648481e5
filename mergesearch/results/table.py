"""The result table: one row a trial, baselines among them; a DataFrame, and its faces as text, of which `terminal` has
the one for a terminal.

pandas is loaded when a table is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.errors import UserError, unknown
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results import frames, markdown
from mergesearch.results.markdown import plain
from mergesearch.results.record import Record, ranked
from mergesearch.results.states import INFEASIBLE
from mergesearch.results.terminal import TerminalTable

if TYPE_CHECKING:
    from pandas import DataFrame

    from mergesearch.results.margins import Margins

TEXT, MARKDOWN, JSON = "text", "md", "json"
CSV, LINES, PARQUET = frames.FORMATS
FORMATS = (TEXT, CSV, MARKDOWN, JSON, LINES, PARQUET)
# what a table may be sorted by, beside its tasks
FIXED = ("rank", "trial", "objective", "expected", "method", "seconds", "state")
FRONT = "front"
EXPECTED = ("expected", "expected_low", "expected_high")


def frame(records: Sequence[Record], top: int | None = None, sort: str = "rank") -> DataFrame:
    """The table as a pandas DataFrame, one row a record, sorted by a column.

    Columns are those of `frames.TRIAL_COLUMNS`, with each task's label for `TASK`. What is missing is NaN or NA.

    Args:
        records: of one run.
        top: only the first rows.
        sort: a column's name; the best come first where a column has a best, what is missing last.

    Raises:
        UserError: there is no column `sort`.
    """
    import pandas

    tasks, fronts = tasks_of(records), has_front(records)
    sortable = (*FIXED, *[FRONT] * fronts, *tasks)
    if sort not in sortable:
        raise unknown("column", sort, sortable, "--sort")
    types = _types(tasks, fronts, _beside(records))
    rows = [_row(position, record, tasks, fronts) for position, record in enumerate(ranked(records), start=1)]
    columns = {name: pandas.Series([row[name] for row in rows], dtype=kind) for name, kind in types.items()}
    whole = pandas.DataFrame(columns)
    best_first = sort in ("objective", "expected", FRONT) or (sort in tasks and tasks[sort].higher_is_better)
    # missing ones keep their order, and stand last
    ordered = whole.sort_values(sort, ascending=not best_first, kind="stable", na_position="last")
    return ordered.iloc[:top].reset_index(drop=True)


def table_rows(records: Sequence[Record], top: int | None = None, sort: str = "rank") -> list[dict[str, Any]]:
    """The rows of the table as plain data, None where something is missing.

    Raises:
        UserError: there is no column `sort`.
    """
    return _plain(frame(records, top, sort))


def tasks_of(records: Sequence[Record]) -> dict[str, TaskScore]:
    """The tasks that the records have scores for, each with one score that names its metric."""
    tasks: dict[str, TaskScore] = {}
    for record in records:
        for task, score in record.scores.items():
            tasks.setdefault(task, score)
    return tasks


def has_front(records: Sequence[Record]) -> bool:
    """Whether the records are of a run with one objective for each task."""
    return any(record.front for record in records)


def render(
    records: Sequence[Record],
    form: str = TEXT,
    top: int | None = None,
    sort: str = "rank",
    margins: Margins | None = None,
) -> Any:
    """The table in a format of `FORMATS`: for `text` a `TerminalTable`, which rich prints in the width there is, else a
    text.

    Args:
        records: of one run.
        form: the format.
        top, sort: as for `frame`.
        margins: over the best single model, for a table as text.

    Raises:
        UserError: there is no such format or column, or the format is Parquet, which is no text: see `write`.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, "--format")
    if form == PARQUET:
        raise UserError(f"--format {PARQUET} is no text: name the file to write with --out")
    table = frame(records, top, sort)
    if form == JSON:
        return json.dumps(_plain(table), indent=1)
    if form == CSV:
        return "" if table.empty else table.to_csv(index=False, lineterminator="\n").rstrip("\n")
    if form == LINES:
        return frames.as_bytes(table, form).decode().rstrip("\n")
    rows, tasks = _plain(table), tasks_of(records)
    if form == TEXT:
        return TerminalTable.of(rows, records, tasks, margins)
    fronts, expects = has_front(records), any(row["expected"] is not None for row in rows)
    told = ["trial", "objective", *["expected"] * expects]
    columns = ["rank", *[FRONT] * fronts, *told, *tasks, "method", "seconds", "state"]
    titles = [_title(column, tasks) for column in columns]
    return markdown.table([plain(each) for each in titles], [[plain(_cell(row, c)) for c in columns] for row in rows])


def write(
    records: Sequence[Record],
    out: Path,
    form: str = TEXT,
    top: int | None = None,
    sort: str = "rank",
    words: Sequence[str] = (),
    margins: Margins | None = None,
) -> None:
    """Writes the table to a file, in any format of `FORMATS`; a file that is there is replaced.

    Args:
        records: of one run.
        out: the file.
        form: the format.
        top, sort, margins: as for `render`.
        words: lines that follow a table as text.

    Raises:
        UserError: there is no such format or column, or the file cannot be written.
    """
    if form == PARQUET:
        data = frames.as_bytes(frame(records, top, sort), form)
    else:
        rendered = render(records, form, top, sort, margins)
        text = "".join(f"{line}\n" for line in (str(rendered), *words)) if form == TEXT else f"{rendered}\n"
        data = text.encode()
    frames.write_bytes(data, out)


def _beside(records: Sequence[Record]) -> set[str]:
    """The tasks that lm-eval's own model scored once more."""
    return {task for record in records for task in record.by_lm_eval}


def _types(tasks: Mapping[str, TaskScore], fronts: bool, beside: Collection[str]) -> dict[str, str]:
    """Every column with its dtype."""
    types: dict[str, str] = {}
    for name, (kind, _) in frames.TRIAL_COLUMNS.items():
        if name == frames.TASK:
            for task in tasks:
                parts = ["", "_stderr", *["_lm_eval"] * (task in beside)]
                types |= {f"{task}{part}": frames.TRIAL_COLUMNS[f"{frames.TASK}{part}"][0] for part in parts}
        elif not name.startswith(frames.TASK) and (name != FRONT or fronts):
            types[name] = kind
    return types


def _row(position: int, record: Record, tasks: Mapping[str, TaskScore], fronts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": position if record.objective is not None and not record.infeasible else None,
        **({FRONT: record.front} if fronts else {}),
        "trial": record.number,
        "objective": record.objective,
        "objective_stderr": record.stderr,
        **dict(zip(EXPECTED, _interval(record), strict=True)),
    }
    for task in tasks:
        score = record.scores.get(task)
        row[task] = score.value if score else None
        row[f"{task}_stderr"] = score.stderr if score else None
        row[f"{task}_lm_eval"] = record.by_lm_eval[task].value if task in record.by_lm_eval else None
    return {
        **row,
        "method": record.method,
        "strategy": record.strategy,
        "seconds": record.seconds,
        "merge_seconds": record.merge_seconds,
        "state": INFEASIBLE if record.infeasible else record.state,
        "error": record.error or record.stopped or record.infeasible,
        "recipe": record.recipe_id,
    }


def _interval(record: Record) -> tuple[float | None, float | None, float | None]:
    known = record.expected if record.objective is not None else None
    return (None, None, None) if known is None else (known.value, known.low, known.high)


def _plain(table: DataFrame) -> list[dict[str, Any]]:
    plain = table.astype(object).where(table.notna(), None)
    return [{str(name): value for name, value in row.items()} for row in plain.to_dict("records")]


def _title(column: str, tasks: Mapping[str, TaskScore]) -> str:
    if column not in tasks:
        return column
    score = tasks[column]
    return f"{column} {score.metric}{'' if score.higher_is_better else ' ↓'}"


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A figure of a task with its standard error, as lm-eval gives it. The objective's own would say how hard the
    documents are, and nothing of who is better: see `margins`."""
    value = row[column]
    if column == "state" and row["error"]:
        return f"{value}: {row['error']}"
    if value is None:
        return "-"
    if column == FRONT:
        return "*" if value else ""
    if column == "seconds":
        return f"{value:.2f}"
    if column == "expected":
        return f"{value:.4f} [{row['expected_low']:.4f}, {row['expected_high']:.4f}]"
    if isinstance(value, float):
        error = row.get(f"{column}_stderr") if column != "objective" else None
        beside = row.get(f"{column}_lm_eval")
        by_lm_eval = f" (lm_eval {beside:.4f})" if beside is not None else ""
        return (f"{value:.4f} ±{error:.4f}" if error is not None else f"{value:.4f}") + by_lm_eval
    return str(value)
