"""The winner against whoever it has to beat, and every finalist and parent task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.results.page import marks
from mergesearch.results.page.marks import Picture
from mergesearch.results.page.subject import SINGLE, WINNER, Intervals, Subject, label_of
from mergesearch.results.record import Record
from mergesearch.results.report.data import OBJECTIVE, Figure
from mergesearch.results.report.words import p_text

SEARCH, HOLDOUT = "search documents", "holdout"


def contenders(subject: Subject, key: str) -> Picture | None:
    """The objective of the winner, of the best single model, the average and the best default, on either side."""
    there = subject.contenders
    if not there:
        return None
    labels = [f"{what}: {label_of(record)}" if what != "plain average" else what for what, record in there.items()]
    return _rows(key, list(there.values()), labels, subject, OBJECTIVE, "objective", 46, legend=True)


def forest(subject: Subject, task: str, key: str) -> Picture:
    """One task's figure of every finalist and parent, with intervals."""
    records, metric = subject.finalists, subject.tasks[task].metric
    return _rows(key, records, [label_of(record) for record in records], subject, task, metric, 26, legend=False)


def _rows(key: str, records: Sequence[Record], labels: Sequence[str], subject: Subject, measure: str, title: str,
          each: int, legend: bool) -> Picture:  # fmt: skip
    data = [
        *_dots(records, labels, subject.search, measure, SEARCH, subject, filled=False),
        *_dots(records, labels, subject.holdout, measure, HOLDOUT, subject, filled=True),
    ]
    layout = {
        "xaxis": {"title": {"text": marks.text(title)}, "automargin": True, "fixedrange": True},
        "yaxis": marks.rows_axis(labels),
        "legend": marks.LEGEND,
        "showlegend": legend and len(data) > 1,
        "shapes": _winner_line(records[0], subject, measure) if records else [],
    }
    what = f"{title} of {len(records)} candidates with 95 % intervals"
    return marks.one(key, data, layout, (110 if legend else 80) + each * len(records), what, labels)


def _dots(records: Sequence[Record], labels: Sequence[str], intervals: Intervals, measure: str, name: str,
          subject: Subject, filled: bool) -> list[dict[str, Any]]:  # fmt: skip
    figures = [intervals.figure(record.number, measure) for record in records]
    if not any(figures):
        return []
    values = [marks.finite(each.value) if each else None for each in figures]
    lows = [marks.finite(each.low) if each else None for each in figures]
    highs = [marks.finite(each.high) if each else None for each in figures]
    color = marks.SERIES[0] if filled else marks.MUTED
    # the two sides stand beside each other
    shift = 0.16 if filled else -0.16
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": values,
            "y": [place + shift for place in range(len(records))],
            "error_x": marks.whiskers(values, lows, highs, color),
            "marker": {
                "color": color if filled else marks.SURFACE,
                "size": 9,
                "line": {"color": color, "width": 2},
                "symbol": "circle",
            },
            "text": [
                f"{marks.text(label)}<br>{name}: {_words(figure)}" if figure else ""
                for label, figure in zip(labels, figures, strict=True)
            ],
            "hovertemplate": "%{text}<extra></extra>",
        }
    ]


def _winner_line(winner: Record, subject: Subject, measure: str) -> list[dict[str, Any]]:
    figure = subject.holdout.figure(winner.number, measure) or subject.search.figure(winner.number, measure)
    if figure is None or marks.finite(figure.value) is None:
        return []
    line = {"color": marks.MUTED, "width": 1, "dash": "dot"}
    ends = {"x0": figure.value, "x1": figure.value, "y0": 0, "y1": 1, "yref": "paper"}
    return [{"type": "line", "layer": "below", "line": line, **ends}]


def _words(figure: Figure, form: str = ".4f") -> str:
    interval = f" [{figure.low:{form}}, {figure.high:{form}}]" if figure.low is not None else ""
    return f"{figure.value:{form}}{interval}"


def differences(subject: Subject) -> list[dict[str, Any]]:
    """The winner minus each of the others: on the search documents, on the holdout, and what the report says of it.

    A difference with an interval that leaves out 0 is `clear`. Only what the report tested has a p-value.
    """
    there = subject.contenders
    if WINNER not in there:
        return []
    winner = there[WINNER].number
    tested = {}
    if subject.report and subject.report.sections:
        rows = subject.report.sections[0].rows
        tested = {c.reference: c for row in rows if row.trial == winner for c in row.compared}
    lines = []
    for what, record in there.items():
        if what == WINNER:
            continue
        claim = tested.get(what)
        held = claim.difference if claim else subject.holdout.difference(winner, record.number)
        lines.append(
            {
                "what": what,
                "label": label_of(record) if what in (SINGLE, "best default") else "",
                "search": _difference(subject.search.difference(winner, record.number)),
                "holdout": _difference(held),
                "p": p_text(claim.p) if claim and claim.p is not None else "",
                "verdict": claim.verdict if claim else "",
            }
        )
    return lines


def _difference(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    clear = figure.low is not None and figure.high is not None and (figure.low > 0 or figure.high < 0)
    interval = f"{figure.low:+.4f} to {figure.high:+.4f}" if figure.low is not None else ""
    return {"value": f"{figure.value:+.4f}", "interval": interval, "clear": clear, "up": figure.value > 0}
