"""The result table: one row for each candidate, baselines among them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.errors import unknown
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.record import Record, ranked

FORMATS = ("text", "csv", "md", "json")
FIXED = ("rank", "trial", "objective", "method", "seconds", "state")


def tasks_of(records: Sequence[Record]) -> dict[str, TaskScore]:
    """The tasks that the records have scores for, each with one score that names its metric."""
    found: dict[str, TaskScore] = {}
    for record in records:
        for task, score in record.scores.items():
            found.setdefault(task, score)
    return found


def table_rows(records: Sequence[Record], top: int | None = None, sort: str = "rank") -> list[dict[str, Any]]:
    """The rows of the table as plain data, sorted by a column; the best first where a column has a best.

    Raises:
        UserError: there is no column `sort`.
    """
    tasks, fronts = tasks_of(records), has_front(records)
    columns = (*FIXED, *["front"] * fronts, *tasks)
    if sort not in columns:
        raise unknown("column", sort, columns, "--sort")
    rows = [_row(position, record, tasks, fronts) for position, record in enumerate(ranked(records), start=1)]
    known = [row for row in rows if row[sort] is not None]
    best_first = sort in ("objective", "front") or (sort in tasks and tasks[sort].higher_is_better)
    known.sort(key=lambda row: row[sort], reverse=best_first)
    return (known + [row for row in rows if row[sort] is None])[:top]


def has_front(records: Sequence[Record]) -> bool:
    """Whether the records are of a run with one objective for each task."""
    return any(record.front for record in records)


def _row(position: int, record: Record, tasks: Mapping[str, TaskScore], fronts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rank": position if record.objective is not None and not record.infeasible else None,
        **({"front": record.front} if fronts else {}),
        "trial": record.number,
        "objective": record.objective,
        "objective_stderr": record.stderr,
    }
    for task in tasks:
        score = record.scores.get(task)
        row[task] = score.value if score else None
        row[f"{task}_stderr"] = score.stderr if score else None
    seconds = record.seconds
    return {
        **row,
        "method": record.method,
        "strategy": record.strategy,
        "seconds": seconds,
        "merge_seconds": record.merge_seconds,
        "state": "infeasible" if record.infeasible else record.state,
        "error": record.error or record.stopped or record.infeasible,
        "recipe": record.recipe_id,
    }


def render(records: Sequence[Record], form: str = "text", top: int | None = None, sort: str = "rank") -> str | Any:
    """The table as text in a format of `FORMATS`; for `text` a rich table, which the terminal lays out."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, "--format")
    rows, tasks = table_rows(records, top, sort), tasks_of(records)
    if form == "json":
        return json.dumps(rows, indent=1)
    if form == "csv":
        return _csv(rows)
    columns = _columns(tasks, has_front(records))
    titles = [_title(column, tasks) for column in columns]
    if form == "md":
        return _markdown(titles, [[_cell(row, column) for column in columns] for row in rows])
    # one error bar a row keeps the table within a terminal
    cells = [[_cell(row, column, with_error=column == "objective") for column in columns] for row in rows]
    return _rich([title.replace(" ", "\n", 1) for title in titles], cells, rows)


def _columns(tasks: Mapping[str, TaskScore], fronts: bool) -> list[str]:
    return ["rank", *["front"] * fronts, "trial", "objective", *tasks, "method", "seconds", "state"]


def _title(column: str, tasks: Mapping[str, TaskScore]) -> str:
    if column not in tasks:
        return column
    score = tasks[column]
    return f"{column} {score.metric}{'' if score.higher_is_better else ' ↓'}"


def _cell(row: Mapping[str, Any], column: str, with_error: bool = True) -> str:
    value = row[column]
    if column == "state" and row["error"]:
        return f"{value}: {row['error']}"
    if value is None:
        return "-"
    if column == "front":
        return "*" if value else ""
    if column == "seconds":
        return f"{value:.2f}"
    if isinstance(value, float):
        error = row.get(f"{column}_stderr") if with_error else None
        return f"{value:.4f} ±{error:.4f}" if error is not None else f"{value:.4f}"
    return str(value)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells])


def _rich(titles: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
    for title in titles:
        numeric = title not in ("method", "state")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row, line in zip(rows, cells, strict=True):
        faint = "dim" if row["state"] in ("failed", "pruned", "infeasible") else None
        table.add_row(*line, style="bold" if row["rank"] == 1 else faint)
    return table
