"""The table as a terminal shows it, in any width.

From left to right: `rank`, `trial`, a mark (B the base, M a single model, D a default such as the plain average; * on
the front of a run with one objective for each task), `objective` and a bar of it, `expected` and `95 %`, `vs NAME` and
`±`, the tasks, `method`, `seconds`, `state`. `expected` is what the objective is expected to be on documents that no
search saw, which the rank goes by, with its 95 % interval. `vs NAME` is the objective minus that of NAME, the best
single model, and ± one standard error of that difference on the same documents: see `margins` for why it is this one.

No digit is cut or folded. Where there is no room for all columns, words are folded first; then columns are left out,
in this order: the bar, seconds, the interval, rank, ±, vs, expected, the tasks from the last to the first. Trial, mark,
objective, method and state are always there. The last line says what was left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mergesearch.evaluate.scores import TaskScore
from mergesearch.evaluate.statistics import Difference
from mergesearch.recipe import BASE
from mergesearch.results.bars import bars
from mergesearch.results.grid import Arrangement, Column, lay_out, lines_of, width_of_all
from mergesearch.results.margins import Margins
from mergesearch.results.record import Record
from mergesearch.results.states import FAILED, INFEASIBLE, PRUNED

# what is left out first has the smallest number; the tasks follow from the last on
BAR, SECONDS, INTERVAL, RANK, ERROR, MARGIN, EXPECTED, TASKS = range(8)
# more reasons than these are for a file to list
REASONS = 8
# why a trial has no place in the ranking, in this order
_REASONED = (FAILED, INFEASIBLE, PRUNED)


@dataclass(frozen=True)
class TerminalTable:
    """What rich prints in the width there is. As `str` it is the text of the whole table, as a file holds it.

    Attributes:
        columns: all of them, from left to right.
        styles: of the rows.
        legend: lines for beneath it.
    """

    columns: tuple[Column, ...]
    styles: tuple[str | None, ...]
    legend: tuple[str, ...]

    @classmethod
    def of(
        cls,
        rows: Sequence[Mapping[str, Any]],
        records: Sequence[Record],
        tasks: Mapping[str, TaskScore],
        margins: Margins | None,
    ) -> TerminalTable:
        """The table of rows as `table.table_rows` gives them.

        Args:
            rows: in their order.
            records: what they are of.
            tasks: the run's tasks, each with one score that names its metric.
            margins: over the best single model.
        """
        by_number = {record.number: record for record in records}
        shown = [by_number[row["trial"]] for row in rows]
        differences = [margins.of(record) if margins else None for record in shown]
        marks = [_mark(record, margins.models if margins else ()) for record in shown]
        columns = _columns(rows, tasks, marks, differences, _name(margins))
        legend = [
            *_reasons(rows),
            *_marks(marks),
            *_expected(rows),
            *_margin(rows, differences, _name(margins) or ""),
        ]
        return cls(tuple(columns), tuple(_style(row) for row in rows), tuple(legend))

    def lines(self, width: int | None = None) -> Iterator[Text]:
        """The table line by line.

        Args:
            width: in cells of a terminal; None for as much as is needed.
        """
        layout = lay_out(self.columns, width)
        yield from lines_of(layout, self.styles)
        beneath = [*self.legend, *([_left_out(layout, self.columns)] if layout.left_out else [])]
        yield from (Text(line, style="dim") for line in ("", *beneath))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def __str__(self) -> str:
        return "\n".join(line.plain for line in self.lines())


def _columns(
    rows: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, TaskScore],
    marks: Sequence[str],
    differences: Sequence[Difference | None],
    single: str | None,
) -> Iterator[Column]:
    objectives = [row["objective"] for row in rows]
    yield Column("rank", "rank", [_whole(row["rank"]) for row in rows], drop=RANK)
    yield Column("trial", "trial", [_whole(row["trial"]) for row in rows])
    if any(marks):
        yield Column("marks", "", marks, right=False)
    yield Column("objective", "objective", [_number(value) for value in objectives])
    drawn = bars(objectives)
    if any(drawn):
        colours = ["red" if (value or 0) < 0 else "green" for value in objectives]
        yield Column("bars", "", drawn, right=False, drop=BAR, spare=True, styles=colours)
    if any(row["expected"] is not None for row in rows):
        yield Column("expected", "expected", [_number(row["expected"]) for row in rows], drop=EXPECTED)
        yield Column("95 %", "95 %", [_between(row) for row in rows], drop=INTERVAL)
    if single and any(differences):
        yield Column(f"vs {single}", f"vs {single}", [_signed(d and d.value) for d in differences], drop=MARGIN)
    if single and any(d and d.stderr is not None for d in differences):
        yield Column("±", "±", [_error(difference) for difference in differences], drop=ERROR)
    for place, (task, score) in enumerate(tasks.items()):
        title = f"{task}\n{score.metric}{'' if score.higher_is_better else ' ↓'}"
        yield Column(task, title, [_number(row[task]) for row in rows], folds=True, drop=TASKS + len(tasks) - place)
    yield Column("method", "method", [row["method"] or "-" for row in rows], words=True, right=False)
    seconds = ["-" if row["seconds"] is None else f"{row['seconds']:.2f}" for row in rows]
    yield Column("seconds", "seconds", seconds, drop=SECONDS, spare=True)
    yield Column("state", "state", [row["state"] for row in rows], right=False)


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    # a perplexity may be as long as a line
    return f"{value:.4f}" if abs(value) < 1e6 or math.isinf(value) else f"{value:.4e}"


def _between(row: Mapping[str, Any]) -> str:
    low, high = row["expected_low"], row["expected_high"]
    return "-" if low is None else f"[{_number(low)}, {_number(high)}]"


def _signed(value: float | None) -> str:
    text = _number(value)
    return f"+{text}" if value is not None and value >= 0 else text


def _error(difference: Difference | None) -> str:
    return _number(difference.stderr) if difference else "-"


def _style(row: Mapping[str, Any]) -> str | None:
    if row["rank"] == 1:
        return "bold"
    return "dim" if row["state"] in _REASONED else None


def _mark(record: Record, models: Sequence[str]) -> str:
    letter = "" if record.name is None else "B" if record.name == BASE else "M" if record.name in models else "D"
    return letter + "*" * record.front + _beside(record)


def _beside(record: Record) -> str:
    """Whether lm-eval's own model, asked once more, gives the figures that are shown."""
    same = [
        f"{score.value:.4f}" == f"{record.scores[task].value:.4f}"
        for task, score in record.by_lm_eval.items()
        if task in record.scores
    ]
    return "" if not same else "=" if all(same) else "≠"


def _name(margins: Margins | None) -> str | None:
    return margins.single.name if margins and margins.single else None


# --- beneath the table ---


def _marks(marks: Sequence[str]) -> list[str]:
    words = {"B": "the base", "M": "a single model", "D": "a default, not searched"}
    there = [f"{letter} {text}" for letter, text in words.items() if any(letter in mark for mark in marks)]
    there += ["* no other is as good on every task and better on one"] * any("*" in mark for mark in marks)
    told = {"=": "= lm-eval's own model gives these figures too", "≠": "≠ it gives others, named below"}
    there += [text for sign, text in told.items() if any(sign in mark for mark in marks)]
    return ["; ".join(there)] if there else []


def _expected(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ranks are given by."""
    if all(row["expected"] is None for row in rows):
        return []
    return [
        "expected: the objective on documents that no search saw, as far as all trials together tell, with its 95 % "
        "interval; ranks go by it"
    ]


def _margin(rows: Sequence[Mapping[str, Any]], differences: Sequence[Difference | None], single: str) -> list[str]:
    """What vs and ± mean, with the figures of the best row, since these columns may be left out."""
    if not any(differences):
        return []
    meaning = f"vs {single}: the objective minus that of {single}, the best single model"
    first = next((place for place, row in enumerate(rows) if row["rank"] == 1), None)
    best = differences[first] if first is not None else None
    if first is None or best is None:
        return [f"{meaning}; ± one standard error on these documents"]
    error = f" ± {_number(best.stderr)} (one standard error on these documents)" if best.stderr is not None else ""
    return [
        f"{meaning}. Trial {rows[first]['trial']}: {_signed(best.value)}{error}; the best of many looks better than it "
        "is: `mergesearch report` scores it on documents that no search saw"
    ]


def _reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why trials failed, may not win or were stopped, each reason once with its trials."""
    trials: dict[tuple[str, str], list[int]] = {}
    for state in _REASONED:
        for row in rows:
            if row["state"] == state and row["error"]:
                trials.setdefault((state, " ".join(row["error"].split())), []).append(row["trial"])
    lines = [f"{state}, {_trials(numbers)}: {reason}" for (state, reason), numbers in trials.items()]
    more = len(lines) - REASONS
    return lines if more <= 1 else [*lines[:REASONS], f"and {more} reasons more: --format csv"]


def _trials(numbers: Sequence[int]) -> str:
    """`trial 3`, `trials 3, 5-8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [f"{a}" if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in runs]
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(parts)}"


def _left_out(layout: Arrangement, columns: Sequence[Column]) -> str:
    names = ", ".join(column.name for column in layout.left_out)
    return f"left out: {names}; a terminal of {width_of_all(columns)} columns shows them, and --format csv"
