"""A run's data as pandas frames with documented columns, and frames as files.

`TRIALS` is the table (`results.table.frame`), `DOCUMENTS` has one row for each trial, task and document, `REPORT` one
for each measure and candidate of the report on the holdout. pandas is loaded when a frame is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch import leftovers
from mergesearch.errors import UserError, unknown
from mergesearch.evaluate.scores import load_documents
from mergesearch.results.record import Record
from mergesearch.results.report.data import AVERAGE, SINGLE, Report
from mergesearch.search.store import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame as DataFrame

TRIALS, DOCUMENTS, REPORT = "trials", "documents", "report"
FRAMES = (TRIALS, DOCUMENTS, REPORT)
CSV, LINES, PARQUET = "csv", "jsonl", "parquet"
FORMATS = (CSV, LINES, PARQUET)

_INTEGER, _NUMBER, _WORD, _TRUTH = "Int64", "float64", "string", "boolean"
# what stands for a task's label in a column's name
TASK = "TASK"
# column -> (dtype, meaning); docs/data.md says the same
TRIAL_COLUMNS: dict[str, tuple[str, str]] = {
    "rank": (_INTEGER, "from 1; missing for what cannot win"),
    "front": (
        "bool",
        "only with `objective: pareto`: no other candidate is at least as good on every task and better on one",
    ),
    "trial": (_INTEGER, "its number"),
    "objective": (_NUMBER, "what the search maximises"),
    "objective_stderr": (_NUMBER, "its standard error"),
    "expected": (
        _NUMBER,
        "what the objective is expected to be on documents that no search saw; ranks go by it where it is known",
    ),
    "expected_low": (_NUMBER, "where its 95 % interval begins"),
    "expected_high": (_NUMBER, "where it ends"),
    TASK: (_NUMBER, "for each task its figure, in the metric's unit"),
    f"{TASK}_stderr": (_NUMBER, "its standard error"),
    f"{TASK}_lm_eval": (
        _NUMBER,
        "only of a task that token tries scored in the search: what lm-eval's own model gives, where it was asked",
    ),
    "method": (_WORD, "what it was made by"),
    "strategy": (_WORD, "who proposed it"),
    "seconds": (_NUMBER, "merging and scoring"),
    "merge_seconds": (_NUMBER, "merging alone"),
    "state": (_WORD, "`complete`, `infeasible`, `pruned`, `failed`, `running`, `waiting`"),
    "error": (_WORD, "why it failed, was stopped or is infeasible"),
    "recipe": (_WORD, "the recipe's id"),
}
DOCUMENT_COLUMNS: dict[str, tuple[str, str]] = {
    "trial": (_INTEGER, "the trial's number"),
    "candidate": (_WORD, "a baseline's name, else `trial N`"),
    "side": (_WORD, "`search` or `holdout`"),
    "task": (_WORD, "the task's label"),
    "metric": (_WORD, "the metric's name, as lm-eval has it"),
    "document": (_INTEGER, "the document's number in the task, from 0"),
    "value": (_NUMBER, "what the document adds to the figure; of a ratio of sums, the numerator"),
    "denominator": (_NUMBER, "of a ratio of sums, as bytes for bits_per_byte; else missing"),
    "gold_logprob": (_NUMBER, "log-probability (nats) of what is right; missing where answers are texts"),
}
REPORT_COLUMNS: dict[str, tuple[str, str]] = {
    "measure": (_WORD, "`objective`, or a task"),
    "metric": (_WORD, "the metric's name; missing for the objective"),
    "higher_is_better": (_TRUTH, "whether more is better"),
    "documents": (_INTEGER, "how many it goes by"),
    "trial": (_INTEGER, "the trial's number"),
    "candidate": (_WORD, "a baseline's name, else `trial N`"),
    "method": (_WORD, "what it was made by"),
    "baseline": (_TRUTH, "whether no search proposed it"),
    "winner": (_TRUTH, "whether the report is about it"),
    "search": (_NUMBER, "its figure on the search documents"),
    "holdout": (_NUMBER, "its figure on the holdout"),
    "holdout_low": (_NUMBER, "where its 95 % interval begins"),
    "holdout_high": (_NUMBER, "where it ends"),
    **{
        f"{key}_{part}": (kind, f"against the {what}: {meaning}")
        for key, what in (("single", SINGLE), ("average", AVERAGE))
        for part, kind, meaning in (
            ("difference", _NUMBER, "the paired difference, more is better"),
            ("low", _NUMBER, "where its 95 % interval begins"),
            ("high", _NUMBER, "where it ends"),
            ("p", _NUMBER, "after Holm's correction"),
            ("verdict", _WORD, "`better`, `worse`, `noise` or `untested`"),
        )
    },
    "error": (_WORD, "why it could not be scored"),
}


def documents(folder: RunFolder, records: Sequence[Record], sides: Iterable[str] = ("search", "holdout")) -> DataFrame:
    """One row for each trial, task and document that was scored; columns as `DOCUMENT_COLUMNS` says.

    Args:
        folder: of the run.
        records: whose documents.
        sides: `search`, `holdout` or both.
    """
    rows: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
    places = {"search": folder.documents, "holdout": lambda number: folder.holdout / f"{number:05d}.npz"}
    for record in records:
        for side in sides:
            try:
                found = load_documents(places[side](record.number))
            except (OSError, ValueError):
                continue
            for task, scores in found.items():
                count = len(scores.ids)
                metric = record.scores[task].metric if task in record.scores else None
                ratio = scores.values.ndim == 2
                columns: dict[str, Any] = {
                    "trial": [record.number] * count,
                    "candidate": [record.name or f"trial {record.number}"] * count,
                    "side": [side] * count,
                    "task": [task] * count,
                    "metric": [metric] * count,
                    "document": scores.ids,
                    "value": (scores.values[:, 0] if ratio else scores.values).tolist(),
                    "denominator": scores.values[:, 1].tolist() if ratio else [None] * count,
                    "gold_logprob": scores.gold.tolist() if scores.gold is not None else [None] * count,
                }
                for name, values in columns.items():
                    rows[name] += values
    return _typed(rows, DOCUMENT_COLUMNS)


def report(held: Report) -> DataFrame:
    """One row for each measure and candidate of a report; columns as `REPORT_COLUMNS` says."""
    rows: dict[str, list[Any]] = {name: [] for name in REPORT_COLUMNS}
    for section in held.sections:
        for row in section.rows:
            line: dict[str, Any] = {
                "measure": section.name,
                "metric": section.metric or None,
                "higher_is_better": section.higher_is_better,
                "documents": section.documents,
                "trial": row.trial,
                "candidate": row.candidate,
                "method": row.method,
                "baseline": row.baseline,
                "winner": row.trial == held.winner_trial,
                "search": row.search,
                "holdout": row.holdout.value if row.holdout else None,
                "holdout_low": row.holdout.low if row.holdout else None,
                "holdout_high": row.holdout.high if row.holdout else None,
                "error": row.error,
            }
            for comparison in row.compared:
                key = "single" if comparison.reference == SINGLE else "average"
                line |= {
                    f"{key}_difference": comparison.difference.value,
                    f"{key}_low": comparison.difference.low,
                    f"{key}_high": comparison.difference.high,
                    f"{key}_p": comparison.p,
                    f"{key}_verdict": comparison.verdict,
                }
            for name, values in rows.items():
                values.append(line.get(name))
    return _typed(rows, REPORT_COLUMNS)


def _typed(rows: dict[str, list[Any]], columns: dict[str, tuple[str, str]]) -> DataFrame:
    import pandas

    return pandas.DataFrame({name: pandas.Series(rows[name], dtype=kind) for name, (kind, _) in columns.items()})


def form_of(out: Path) -> str:
    """The format that a file's ending names.

    Raises:
        UserError: it names none.
    """
    ending = out.suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise unknown("ending", out.suffix, [f".{form}" for form in FORMATS], str(out))
    return ending


def write(frame: DataFrame, out: Path, form: str | None = None) -> None:
    """Writes a frame to a file; one that is there is replaced.

    Args:
        frame: what is written.
        out: the file.
        form: `csv`, `jsonl` (one JSON object a line) or `parquet`; None for what the ending names.

    Raises:
        UserError: there is no such format, or the file cannot be written.
    """
    write_bytes(as_bytes(frame, form or form_of(out)), out)


def write_bytes(data: bytes, out: Path) -> None:
    """Writes data to a file; one that is there is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    leftovers.clear(out.parent, out.name)
    try:
        with leftovers.writing(out) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file") from None


def as_bytes(frame: DataFrame, form: str) -> bytes:
    """A frame in a format of `FORMATS`.

    Raises:
        UserError: there is no such format.
    """
    if form == CSV:
        return str(frame.to_csv(index=False, lineterminator="\n")).encode()
    if form == LINES:
        return str(frame.to_json(orient="records", lines=True, double_precision=15)).encode()
    if form == PARQUET:
        file = io.BytesIO()
        frame.to_parquet(file, index=False)
        return file.getvalue()
    raise unknown("format", form, FORMATS, "--format")
