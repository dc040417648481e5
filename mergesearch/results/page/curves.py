"""How the search went: the best so far, what each trial cost, and what a search score is worth on the holdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mergesearch.recipe import BASE
from mergesearch.results.page import marks
from mergesearch.results.page.marks import Picture
from mergesearch.results.page.subject import WINNER, Subject, label_of, stages
from mergesearch.results.record import Record
from mergesearch.search.history import settled_at, spans
from mergesearch.search.speed import learning_seconds
from mergesearch.search.trials import Trial

DOCUMENTS, HOURS = "document evaluations", "hours at work"


@dataclass(frozen=True)
class Dot:
    """A trial that was scored, in the order in which trials were settled.

    Attributes:
        documents: document evaluations of the run when it was settled.
        hours: hours of the run at which at least one worker was at work, by then.
        best: the best objective by then of a candidate that breaks no guard; None before there is one.
    """

    record: Record
    documents: int
    hours: float
    best: float | None


def points(subject: Subject) -> list[Dot]:
    """Every complete trial with what the run had cost when it was settled."""
    records = {record.number: record for record in subject.run.records}
    settled = [(moment, trial) for trial in subject.trials if (moment := settled_at(trial)) is not None]
    settled.sort(key=lambda pair: (pair[0], pair[1].number))
    worked = _Worked(subject.trials)
    found, documents, best = [], 0, None
    for moment, trial in settled:
        documents += trial.documents
        record = records[trial.number]
        if record.objective is None:
            continue
        if not record.infeasible and (best is None or record.objective > best):
            best = record.objective
        found.append(Dot(record, documents, worked.hours(moment), best))
    return found


class _Worked:
    """The time in which at least one worker was at a trial."""

    def __init__(self, trials: Sequence[Trial]):
        self.spans: list[tuple[datetime, datetime]] = []
        for start, end in sorted(span for trial in trials for span in spans(trial)):
            if self.spans and start <= self.spans[-1][1]:
                self.spans[-1] = (self.spans[-1][0], max(end, self.spans[-1][1]))
            else:
                self.spans.append((start, end))

    def hours(self, moment: datetime) -> float:
        """By a moment."""
        seconds = sum((min(end, moment) - start).total_seconds() for start, end in self.spans if start < moment)
        return seconds / 3600


def best_so_far(subjects: Sequence[Subject], key: str) -> Picture | None:
    """The best objective over what it cost, with every trial, baselines as lines and stages as bands.

    Several runs share it where they maximise the same.
    """
    mine = [(subject, points(subject)) for subject in subjects]
    if not mine[0][1]:
        return None
    views = {}
    for name, of in ((DOCUMENTS, lambda p: p.documents), (HOURS, lambda p: p.hours)):
        data: list[dict[str, Any]] = []
        shapes: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        colors = {stage: marks.series(n) for n, stage in enumerate(stages(p.record for p in mine[0][1]))}
        shapes += _bands(mine[0][1], of, colors)
        low, high = _range([p for _, found in mine for p in found], subjects[0])
        for place, (subject, found) in enumerate(mine):
            if place == 0:
                data += _dots(found, of, colors, (low, high))
            data.append(_steps(found, of, subject.name if len(mine) > 1 else "best so far", place))
        lines, notes = _lines(subjects[0], low, high)
        title = {"title": {"text": name}, "automargin": True, "rangemode": "tozero", "fixedrange": True}
        layout = {
            "xaxis": title,
            "yaxis": {"title": {"text": "objective"}, "range": [low, high], "automargin": True, "fixedrange": True},
            "shapes": [*shapes, *lines],
            "annotations": notes,
            "legend": marks.LEGEND,
            "hovermode": "closest",
        }
        views[name] = marks.view(data, layout)
    return Picture(key, views, 440, "the best objective so far over document evaluations and over hours")


def _range(found: Sequence[Dot], subject: Subject) -> tuple[float, float]:
    """What is worth seeing: from the weakest of the lines to the best; what fell far below stands at the edge."""
    values = [p.record.objective for p in found if p.record.objective is not None]
    lines = [value for _, value in _references(subject)]
    low, high = min(lines, default=min(values)), max([*values, *lines])
    span = (high - low) or max(abs(high), 1.0) * 0.1
    return low - 0.08 * span, high + 0.1 * span


def _references(subject: Subject) -> list[tuple[str, float]]:
    """What is drawn as a line, by its name."""
    there = [(label_of(r), r) for what, r in subject.contenders.items() if what != WINNER]
    there += [(BASE, subject.base)] if subject.base is not None else []
    return [(name, record.objective) for name, record in there if record.objective is not None]


def _lines(subject: Subject, low: float, high: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of the baselines, and their names; those that are too close to each other share a place."""
    lines, groups = [], []
    for name, value in sorted(_references(subject), key=lambda pair: pair[1]):
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
        lines.append({"type": "line", "line": {"color": marks.MUTED, "width": 1, "dash": "dash"}, **ends})
        if groups and value - groups[-1][1] < 0.05 * (high - low):
            # above all of its lines, so that none goes through it
            groups[-1] = (f"{groups[-1][0]}, {marks.short(name)}", value)
        else:
            groups.append((marks.short(name), value))
    notes = [
        {"text": name, "x": 1, "xref": "paper", "xanchor": "right", "y": value, "yanchor": "bottom",
         "showarrow": False, "font": {"color": marks.MUTED, "size": 11}}
        for name, value in groups
    ]  # fmt: skip
    return lines, notes


def _bands(found: Sequence[Dot], of: Any, colors: Mapping[str, str]) -> list[dict[str, Any]]:
    """Where one stage ended and the next began."""
    shapes, begin = [], 0.0
    for place, point in enumerate(found):
        stage = point.record.strategy or ""
        following = found[place + 1].record.strategy or "" if place + 1 < len(found) else None
        if following != stage:
            ends = {"x0": begin, "x1": of(point), "y0": 0, "y1": 1, "yref": "paper"}
            shapes.append({"type": "rect", "layer": "below", "fillcolor": colors[stage], "opacity": 0.09,
                           "line": {"width": 0}, **ends})  # fmt: skip
            begin = of(point)
    return shapes


def _dots(found: Sequence[Dot], of: Any, colors: Mapping[str, str],
          ends: tuple[float, float]) -> list[dict[str, Any]]:  # fmt: skip
    traces = []
    for stage, color in colors.items():
        mine = [p for p in found if (p.record.strategy or "") == stage]
        heights = [p.record.objective or 0.0 for p in mine]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": marks.short(stage or "other"),
                "x": [of(p) for p in mine],
                # what is far below stands at the edge, as a triangle
                "y": [max(height, ends[0] + 0.02 * (ends[1] - ends[0])) for height in heights],
                "marker": {
                    "color": color,
                    "size": 7,
                    "opacity": 0.85,
                    "symbol": ["triangle-down" if height < ends[0] else "circle" for height in heights],
                },
                "text": [_told(p.record) for p in mine],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    return traces


def _told(record: Record) -> str:
    guard = "<br>breaks a guard" if record.infeasible else ""
    return f"{marks.text(label_of(record))}<br>objective {record.objective:.4f}{guard}"


def _steps(found: Sequence[Dot], of: Any, name: str, place: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": marks.short(name),
        "x": [of(p) for p in found],
        "y": [marks.finite(p.best) for p in found],
        "line": {"color": marks.INK if place == 0 else marks.series(place + 2), "width": 2.5, "shape": "hv"},
        "hovertemplate": "best so far %{y:.4f}<extra></extra>",
    }


# --- where time and documents went ---


def spent(subject: Subject, key: str) -> Picture | None:
    """Seconds and document evaluations of each stage, by what they went into."""
    names = {record.number: record.strategy or "other" for record in subject.run.records}
    ended = [trial for trial in subject.trials if trial.state.settled]
    if not ended:
        return None
    labels = list(dict.fromkeys(names[trial.number] for trial in ended))
    kinds = ("scoring", "learning", "merging")
    seconds: dict[str, dict[str, float]] = {what: dict.fromkeys(labels, 0.0) for what in kinds}
    documents: dict[str, dict[str, float]] = {what: dict.fromkeys(labels, 0.0) for what in kinds[:2]}
    for trial in ended:
        stage = names[trial.number]
        seconds["scoring"][stage] += trial.score_seconds or 0.0
        seconds["merging"][stage] += trial.merge_seconds or 0.0
        seconds["learning"][stage] += learning_seconds(trial) or 0.0
        documents["learning"][stage] += trial.learning_documents
        documents["scoring"][stage] += trial.documents - trial.learning_documents
    total = sum(sum(of.values()) for of in seconds.values())
    unit, divisor = ("hours", 3600.0) if total > 7200 else ("minutes", 60.0)
    views = {
        unit: _bars(seconds, labels, unit, divisor),
        DOCUMENTS: _bars(documents, labels, DOCUMENTS, 1.0),
    }
    return Picture(key, views, 120 + 34 * len(labels), "time and document evaluations of each stage")


def _bars(
    amounts: Mapping[str, Mapping[str, float]], labels: Sequence[str], title: str, divisor: float
) -> dict[str, Any]:
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": what,
            "x": [of[label] / divisor for label in labels],
            "y": list(range(len(labels))),
            "marker": {"color": marks.series(place)},
            "text": [marks.text(label) for label in labels],
            "textposition": "none",
            "hovertemplate": f"%{{text}}<br>{what} %{{x:,.3~f}} {title}<extra></extra>",
        }
        for place, (what, of) in enumerate(amounts.items())
        if any(of.values())
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": title}, "automargin": True, "fixedrange": True, "rangemode": "tozero"},
        "yaxis": marks.rows_axis(labels),
        "legend": marks.LEGEND,
        "showlegend": True,
    }
    return marks.view(data, layout, labels)


# --- what a search score is worth ---


def search_against_holdout(subject: Subject, key: str) -> Picture | None:
    """Each finalist's objective on the holdout over that on the search documents, with the band of noise."""
    if subject.report is None or not subject.report.sections:
        return None
    rows = [
        row
        for row in subject.report.sections[0].rows
        if row.holdout is not None and None not in (marks.finite(row.search), marks.finite(row.holdout.value))
    ]
    if not rows:
        return None
    winner = subject.report.winner_trial
    low = min(min(row.search or 0.0, row.holdout.value) for row in rows if row.holdout)
    high = max(max(row.search or 0.0, row.holdout.value) for row in rows if row.holdout)
    margin = ((high - low) or 0.1) * 0.06
    ends = [low - margin, high + margin]
    half = _half(rows)
    data: list[dict[str, Any]] = []
    if half:
        data.append(
            {"type": "scatter", "mode": "lines", "name": f"± {half:.3f}, the usual 95 % interval",
             "x": [*ends, *reversed(ends)],
             "y": [ends[0] - half, ends[1] - half, ends[1] + half, ends[0] + half],
             "fill": "toself", "fillcolor": marks.SERIES[0], "opacity": 0.15, "line": {"width": 0}, "hoverinfo": "skip"}
        )  # fmt: skip
    data.append(
        {"type": "scatter", "mode": "lines", "name": "as good as on the search documents", "x": ends, "y": ends,
         "line": {"color": marks.MUTED, "width": 1, "dash": "dash"}, "hoverinfo": "skip"}
    )  # fmt: skip
    for name, mine, color in (
        ("baselines", [r for r in rows if r.baseline and r.trial != winner], marks.MUTED),
        ("proposals", [r for r in rows if not r.baseline and r.trial != winner], marks.SERIES[1]),
        ("winner", [r for r in rows if r.trial == winner], marks.SERIES[0]),
    ):
        if not mine:
            continue
        values = [row.holdout.value if row.holdout else None for row in mine]
        lows = [row.holdout.low if row.holdout else None for row in mine]
        highs = [row.holdout.high if row.holdout else None for row in mine]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [row.search for row in mine],
                "y": values,
                "error_y": marks.whiskers(values, lows, highs, color),
                "marker": {"color": color, "size": 11 if name == "winner" else 8},
                "text": [
                    f"{marks.text(row.candidate)} {marks.text(row.method) if not row.baseline else ''}"
                    f"<br>search {row.search:.4f}, holdout {value:.4f}"
                    for row, value in zip(mine, values, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "objective on the search documents"}, "automargin": True, "fixedrange": True},
        "yaxis": {"title": {"text": "objective on the holdout"}, "automargin": True, "fixedrange": True},
        "legend": marks.LEGEND,
        "hovermode": "closest",
    }
    return marks.one(key, data, layout, 460, "the objective on the holdout over that on the search documents")


def _half(rows: Sequence[Any]) -> float | None:
    """Half the width of the usual interval: the median of the rows'."""
    halves = sorted((r.holdout.high - r.holdout.low) / 2 for r in rows if r.holdout and r.holdout.low is not None)
    return halves[len(halves) // 2] if halves else None
