"""A report as a terminal shows it, in any width: the finding, the figures, the differences, and what else there is.

No digit is cut. Where there is no room, columns are left out: of the figures the interval, the search score, then the
tasks from the last to the first; of the differences that to the plain average first. Markdown and JSON hold everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mergesearch.results.grid import Column, lay_out, lines_of, width_of_all
from mergesearch.results.report.data import AVERAGE, OBJECTIVE, AsServed, Comparison, Figure, Report, Row, Section
from mergesearch.results.report.words import METHOD, difference_cell, remarks, served_cells, served_title

# what is left out first has the smallest number; the tasks follow from the last on
INTERVAL, SEARCH, TASKS = range(3)


@dataclass(frozen=True)
class TerminalReport:
    """What rich prints in the width there is. As `str` it is the whole text, as wide as need be."""

    report: Report

    def lines(self, width: int | None = None) -> Iterator[Text]:
        """The report line by line; a line of words may be longer than the width, and rich folds it.

        Args:
            width: in cells of a terminal; None for as much as is needed.
        """
        report = self.report
        yield Text(report.sentence, style="bold")
        yield Text()
        if report.sections:
            styles = ["bold" if row.trial == report.winner_trial else None for row in report.sections[0].rows]
            heading = f"Figures on the holdout, {report.sections[0].documents:,} documents"
            yield from _table(heading, list(_figures(report)), styles, width)
            yield from self._differences(width)
        if report.served is not None:
            styles = ["bold" if row.trial == report.winner_trial else None for row in report.served.rows]
            yield from _table(served_title(report.served), list(_served(report.served)), styles, width)
        for text in (*_failures(report), *remarks(report)):
            yield Text(text)
            yield Text()
        yield Text(METHOD, style="dim")

    def _differences(self, width: int | None) -> Iterator[Text]:
        rows = [(section, row) for section in self.report.sections for row in section.rows if row.compared]
        if not rows:
            return
        styles = ["bold" if row.trial == self.report.winner_trial else None for _, row in rows]
        yield from _table("Differences on the holdout, + is better", list(_compared(rows)), styles, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def __str__(self) -> str:
        return "\n".join(line.plain for line in self.lines())


def _table(heading: str, columns: Sequence[Column], styles: Sequence[str | None], width: int | None) -> Iterator[Text]:
    layout = lay_out(columns, width)
    yield Text(heading, style="bold")
    yield from lines_of(layout, styles)
    if layout.left_out:
        names = ", ".join(column.name for column in layout.left_out)
        words = f"left out: {names}; a terminal of {width_of_all(columns)} columns shows them, and --format md"
        yield Text(words, style="dim")
    yield Text()


def _figures(report: Report) -> Iterator[Column]:
    """Every candidate's objective on either side, and its tasks on the holdout."""
    first, *tasks = report.sections
    yield Column("candidate", "candidate", [_label(row) for row in first.rows], words=True, right=False)
    yield Column("search", "search", [_number(row.search) for row in first.rows], drop=SEARCH)
    if any(row.expected for row in first.rows):
        yield Column("expected", "expected", [_value(row.expected) for row in first.rows], drop=SEARCH)
    yield Column("holdout", "holdout", [_value(row.holdout) for row in first.rows])
    yield Column("95 % interval", "95 % interval", [_interval(row.holdout) for row in first.rows], drop=INTERVAL)
    for place, section in enumerate(tasks):
        values = {row.trial: _value(row.holdout) for row in section.rows}
        cells = [values.get(row.trial, "-") for row in first.rows]
        yield Column(section.name, _title(section), cells, folds=True, drop=TASKS + len(tasks) - place)


def _compared(rows: Sequence[tuple[Section, Row]]) -> Iterator[Column]:
    """The differences of whoever was proposed, to each reference."""
    names = [section.name for section, _ in rows]
    # a measure is named once
    shown = [name if place == 0 or names[place - 1] != name else "" for place, name in enumerate(names)]
    yield Column("measure", "measure", shown, words=True, right=False)
    yield Column("candidate", "candidate", [_label(row) for _, row in rows], words=True, right=False)
    references: dict[str, str] = {c.reference: c.against for _, row in rows for c in row.compared}
    for place, (what, label) in enumerate(references.items()):
        title = f"against {label}" if what == AVERAGE else f"against {label},\n{what}"
        cells = [difference_cell(_with(row, what)) for _, row in rows]
        yield Column(f"against {label}", title, cells, drop=len(references) - place)


def _served(served: AsServed) -> Iterator[Column]:
    cells = list(zip(*served_cells(served), strict=True))
    yield Column("candidate", "candidate", cells[0], words=True, right=False)
    for place, (name, values) in enumerate(zip(served.names, cells[1:], strict=True)):
        yield Column(name, name, values, folds=True, drop=TASKS + len(cells) - place if place else None)


def _failures(report: Report) -> list[str]:
    rows = report.sections[0].rows if report.sections else ()
    return [f"{row.candidate} could not be scored on the holdout: {row.error}." for row in rows if row.error]


def _with(row: Row, reference: str) -> Comparison | None:
    return next((comparison for comparison in row.compared if comparison.reference == reference), None)


def _label(row: Row) -> str:
    label = row.candidate if row.baseline else f"{row.candidate} {row.method}"
    return f"{label} (failed)" if row.error else label


def _title(section: Section) -> str:
    return (
        section.name
        if section.name == OBJECTIVE
        else (f"{section.name}\n{section.metric}{'' if section.higher_is_better else ' ↓'}")
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _value(figure: Figure | None) -> str:
    return _number(figure.value if figure else None)


def _interval(figure: Figure | None) -> str:
    return "-" if figure is None or figure.low is None else f"[{figure.low:.4f}, {figure.high:.4f}]"
