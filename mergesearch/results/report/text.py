"""A report as text for a terminal, Markdown, JSON, and as a part of a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mergesearch.errors import unknown
from mergesearch.results.markdown import plain, table
from mergesearch.results.report.data import AVERAGE, AsServed, Report, Row, Section
from mergesearch.results.report.terminal import TerminalReport
from mergesearch.results.report.words import METHOD, cell, difference_cell, remarks, served_cells, served_title

TEXT, MARKDOWN, JSON = "text", "md", "json"
FORMATS = (TEXT, MARKDOWN, JSON)


def render(report: Report, form: str = TEXT) -> str | TerminalReport:
    """The report in a format of `FORMATS`: for `text` a `TerminalReport`, which rich prints in the width there is, else
    a text.

    Raises:
        UserError: there is no such format.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, "--format")
    if form == JSON:
        return json.dumps(report.to_data(), indent=1)
    return _markdown(report) if form == MARKDOWN else TerminalReport(report)


def card(report: Report, trial: int) -> str | None:
    """The holdout figures of one candidate beside the baselines, for its model card; None where it was no finalist."""
    if not report.sections or trial not in (row.trial for row in report.sections[0].rows):
        return None
    rows = {row.trial: [cell(row.holdout, "\n")] for row in report.sections[0].rows}
    for section in report.sections[1:]:
        there = {row.trial: row for row in section.rows}
        for number, cells in rows.items():
            cells.append(cell(there[number].holdout if number in there else None, " "))
    first = {row.trial: row for row in report.sections[0].rows}
    shown = [trial, *(n for n in rows if n != trial and first[n].baseline)]
    labels = {n: "**this model**" if n == trial else plain(first[n].candidate) for n in shown}
    titles = ["candidate", *(plain(_title(section)) for section in report.sections)]
    figures = table(titles, [[labels[n], *rows[n]] for n in shown])
    sentence = [plain(report.sentence)] if trial == report.winner_trial else []
    parts = [*sentence, figures, "In brackets: 95 % intervals."]
    if report.served is not None:
        lines = [
            ["**this model**" if row.trial == trial else plain(row.candidate), *map(plain, line[1:])]
            for row, line in zip(report.served.rows, served_cells(report.served), strict=True)
            if row.trial in shown
        ]
        parts += [plain(f"{served_title(report.served)}:"), _served_table(report.served, lines)]
    return "\n\n".join(parts)


def _served_table(served: AsServed, lines: list[list[str]]) -> str:
    return table(["candidate", *map(plain, served.names)], lines)


def _markdown(report: Report) -> str:
    parts = [f"# {plain(report.run)}: report on the holdout", f"**{plain(report.sentence)}**"]
    for section in report.sections:
        lines = [list(map(plain, line)) for line in _lines(section)]
        parts += [f"## {plain(_heading(section))}", table(list(map(plain, _titles(section))), lines)]
    if report.served is not None:
        lines = [list(map(plain, line)) for line in served_cells(report.served)]
        parts += [f"## {plain(served_title(report.served))}", _served_table(report.served, lines)]
    parts += [*map(plain, remarks(report)), METHOD]
    return "\n\n".join(parts)


def _heading(section: Section) -> str:
    metric = f", {section.metric}" if section.metric else ""
    direction = "" if section.higher_is_better else ", lower is better"
    return f"{section.name}{metric}{direction}, {section.documents:,} documents"


def _title(section: Section) -> str:
    return f"{section.name}{f' ({section.metric})' if section.metric else ''}"


def _titles(section: Section) -> list[str]:
    against = _references(section).items()
    columns = [f"against {label}" if what == AVERAGE else f"against {label},\n{what}" for what, label in against]
    expected = ["expected"] * _expects(section)
    return ["candidate", "search", *expected, "holdout", *columns]


def _expects(section: Section) -> bool:
    return any(row.expected for row in section.rows)


def _references(section: Section) -> dict[str, str]:
    """What the reference is -> its label, for the references that something was compared with."""
    return {comparison.reference: comparison.against for row in section.rows for comparison in row.compared}


def _lines(section: Section) -> list[list[str]]:
    references = list(_references(section))
    return [_line(row, references, _expects(section)) for row in section.rows]


def _line(row: Row, references: Sequence[str], expects: bool) -> list[str]:
    label = row.candidate if row.baseline else f"{row.candidate} {row.method}"
    compared = {c.reference: c for c in row.compared}
    holdout = f"failed: {row.error}" if row.error else cell(row.holdout)
    expected = [cell(row.expected)] * expects
    return [
        label,
        _number(row.search),
        *expected,
        holdout,
        *(difference_cell(compared.get(what)) for what in references),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
