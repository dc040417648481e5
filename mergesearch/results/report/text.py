"""A report as text for a terminal, Markdown, JSON, and as a part of a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mergesearch.errors import unknown
from mergesearch.results.report.data import AVERAGE, OBJECTIVE, Comparison, Figure, GuardOutcome, Report, Row, Section
from mergesearch.results.report.words import p_text

TEXT, MARKDOWN, JSON = "text", "md", "json"
FORMATS = (TEXT, MARKDOWN, JSON)
METHOD = (
    "Intervals: 95 %, paired bootstrap over documents, stratified by task. Differences: on the same documents, turned "
    "so that + is better; p by the paired randomisation test, two-sided, after Holm's correction (the winner's "
    "objective against the references together, everything else together); * is beyond noise at 5 %. The winner and "
    "the best single model were fixed on the search documents; a search score is biased upwards for whatever was "
    "chosen by it."
)


def render(report: Report, form: str = TEXT) -> str | list[Any]:
    """The report in a format of `FORMATS`; for `text` what rich prints, piece by piece."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS, "--format")
    if form == JSON:
        return json.dumps(report.to_data(), indent=1)
    return _markdown(report) if form == MARKDOWN else _rich(report)


def card(report: Report, trial: int) -> str | None:
    """The holdout figures of one candidate beside the baselines, for its model card; None where it was no finalist."""
    if not report.sections or trial not in (row.trial for row in report.sections[0].rows):
        return None
    rows = {row.trial: [_score(row.holdout, "\n")] for row in report.sections[0].rows}
    for section in report.sections[1:]:
        for row in section.rows:
            rows[row.trial].append(_score(row.holdout, " "))
    first = {row.trial: row for row in report.sections[0].rows}
    shown = [trial, *(n for n in rows if n != trial and first[n].baseline)]
    labels = {n: "**this model**" if n == trial else first[n].candidate for n in shown}
    titles = ["candidate", *(_title(section) for section in report.sections)]
    table = _table(titles, [[labels[n], *rows[n]] for n in shown])
    return "\n\n".join(
        [*([report.sentence] if trial == report.winner_trial else []), f"{table}", "In brackets: 95 % intervals."]
    )


def _markdown(report: Report) -> str:
    parts = [f"# {report.run}: report on the holdout", f"**{report.sentence}**"]
    for section in report.sections:
        lines = [[cell.replace("\n", " ") for cell in line] for line in _lines(section)]
        parts += [f"## {_heading(section)}", _table(_titles(section), lines)]
    parts += [f"{line}" for line in (*_guards(report), *_curse(report), *_noise(report), *_notes(report), METHOD)]
    return "\n\n".join(parts)


def _rich(report: Report) -> list[Any]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    pieces: list[Any] = []
    for section in report.sections:
        table = Table(title=_heading(section), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for position, title in enumerate(_titles(section)):
            table.add_column(Text(title), justify="left" if position == 0 else "right")
        for row, line in zip(section.rows, _lines(section), strict=True):
            table.add_row(*map(Text, line), style="bold" if row.trial == report.winner_trial else None)
        pieces.append(table)
    texts = [*_guards(report), *_curse(report), *_noise(report), *_notes(report), METHOD]
    return [*pieces, *(Text(line + "\n") for line in texts), Text(report.sentence, style="bold")]


def _heading(section: Section) -> str:
    metric = f", {section.metric}" if section.metric else ""
    direction = "" if section.higher_is_better else ", lower is better"
    return f"{section.name}{metric}{direction}, {section.documents:,} documents"


def _title(section: Section) -> str:
    return f"{section.name}{f' ({section.metric})' if section.metric else ''}"


def _titles(section: Section) -> list[str]:
    against = _references(section).items()
    columns = [f"against {label}" if what == AVERAGE else f"against {label},\n{what}" for what, label in against]
    return ["candidate", "search", "holdout", *columns]


def _references(section: Section) -> dict[str, str]:
    """What the reference is -> its label, for the references that something was compared with."""
    return {comparison.reference: comparison.against for row in section.rows for comparison in row.compared}


def _lines(section: Section) -> list[list[str]]:
    references = list(_references(section))
    return [_line(row, references) for row in section.rows]


def _line(row: Row, references: Sequence[str]) -> list[str]:
    label = row.candidate if row.baseline else f"{row.candidate} {row.method}"
    compared = {c.reference: c for c in row.compared}
    holdout = f"failed: {row.error}" if row.error else _score(row.holdout)
    return [label, _number(row.search), holdout, *(_difference(compared.get(what)) for what in references)]


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    p = f", {p_text(comparison.p)}{' *' * comparison.beyond_noise}" if comparison.p is not None else ""
    return _score(comparison.difference, p + "\n", "+.4f")


def _score(figure: Figure | None, between: str = "\n", form: str = ".4f") -> str:
    if figure is None:
        return "-"
    interval = f"[{figure.low:{form}}, {figure.high:{form}}]" if figure.low is not None else ""
    return f"{figure.value:{form}}{between}{interval}".rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _curse(report: Report) -> list[str]:
    """The winner's search score beside what it is worth."""
    rows = report.sections[0].rows if report.sections else ()
    scored = [row for row in rows if row.holdout and row.search is not None]
    changes = {row.trial: row.holdout.value - row.search for row in scored if row.holdout and row.search is not None}
    if report.winner_trial not in changes:
        return []
    others = [changes[row.trial] for row in scored if row.baseline and row.trial != report.winner_trial]
    beside = f"; the baselines changed by {sum(others) / len(others):+.4f} on average" if others else ""
    return [
        f"Winner's curse: from the search documents to the holdout the {OBJECTIVE} of {report.winner} changed by "
        f"{changes[report.winner_trial]:+.4f}{beside}."
    ]


def _guards(report: Report) -> list[str]:
    return [_guard(report.winner, outcome) for outcome in report.guards]


def _guard(winner: str, outcome: GuardOutcome) -> str:
    allowed = f"allowed {-outcome.max_drop:+.4f}" if outcome.max_drop else "allowed 0"
    if outcome.difference is None:
        return f"Guard {outcome.task}: {winner} or {outcome.against} could not be scored on the holdout."
    against = f"{winner} against {outcome.against} {_score(outcome.difference, ' ', '+.4f')}, {allowed}"
    return f"Guard {outcome.task} ({outcome.metric}), on the holdout, + is better: {against}: {outcome.verdict}."


def _noise(report: Report) -> list[str]:
    if not report.noise:
        return []
    parts = [f"{n.name} {n.second - n.first:+.2g}{f' ({n.changed} documents changed)' * (n.changed is not None)}"
             for n in report.noise]  # fmt: skip
    return [f"Noise floor: {report.winner} built and scored again ({report.repeat}) differs by {', '.join(parts)}."]


def _notes(report: Report) -> list[str]:
    return [f"Note: {note}." for note in report.notes]


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([row(titles), "|" + "---|" * len(titles), *(row(line) for line in lines)])
