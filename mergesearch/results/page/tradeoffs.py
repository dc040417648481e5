"""What one task costs another, and which parameters mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.results.page import marks
from mergesearch.results.page.marks import Picture
from mergesearch.results.page.subject import WINNER, Subject, label_of
from mergesearch.search.objective import signed

# of one method's parameters
MOST = 12


def tradeoffs(subject: Subject) -> dict[str, Any] | None:
    """Every scored candidate's figures on all tasks, for a picture of any two of them; None with fewer than two tasks.

    `front` says of whom no other candidate is at least as good on every task and better on one.
    """
    tasks = subject.tasks
    if len(tasks) < 2:
        return None
    records = [record for record in subject.scored if tasks.keys() <= record.scores.keys()]
    front = pareto([[signed(record.scores[task]) for task in tasks] for record in records])
    winner = subject.contenders[WINNER].number if subject.contenders else None
    parents = set(subject.run.config.parents)
    kinds = [
        "winner" if r.number == winner else "parent" if r.name in parents else "baseline" if r.name else "proposal"
        for r in records
    ]
    first, second = _apart(subject)
    return {
        "tasks": [
            {"name": task, "title": marks.short(f"{task} {score.metric}", 40), "up": score.higher_is_better}
            for task, score in tasks.items()
        ],
        "values": [[marks.finite(record.scores[task].value) for record in records] for task in tasks],
        "labels": [marks.text(label_of(record)) for record in records],
        "kinds": kinds,
        "front": front,
        "first": first,
        "second": second,
    }


def pareto(values: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each is dominated by no other: more is better in every place."""
    return [
        not any(all(a >= b for a, b in zip(other, mine, strict=True)) and list(other) != list(mine) for other in values)
        for mine in values
    ]


def _apart(subject: Subject) -> tuple[int, int]:
    """The two tasks to begin with: on which the candidates disagree most, by the correlation of their figures."""
    names = list(subject.tasks)
    columns = [[signed(r.scores[t]) for r in subject.scored if t in r.scores] for t in names]
    pairs = [(_correlation(columns[a], columns[b]), a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    _, first, second = min(pairs)
    return first, second


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    count = min(len(one), len(other))
    if count < 3:
        return 0.0
    mean, mean2 = sum(one) / count, sum(other) / count
    both = sum((a - mean) * (b - mean2) for a, b in zip(one, other, strict=False))
    squares = sum((a - mean) ** 2 for a in one) * sum((b - mean2) ** 2 for b in other)
    return both / squares**0.5 if squares > 0 else 0.0


def importances(subject: Subject, key: str) -> list[Picture]:
    """For each method, how much of the variance of the objective each parameter accounts for."""
    pictures = []
    for place, one in enumerate(subject.importances):
        shares: Mapping[str, float] = one["shares"]
        ordered = sorted(shares.items(), key=lambda pair: -pair[1])[:MOST]
        labels = [name for name, _ in ordered]
        data = [
            {
                "type": "bar",
                "orientation": "h",
                "x": [share for _, share in ordered],
                "y": list(range(len(ordered))),
                "marker": {"color": marks.SERIES[0]},
                "text": [f"{marks.text(name)}: {share:.0%}" for name, share in ordered],
                "textposition": "none",
                "hovertemplate": "%{text}<extra></extra>",
            }
        ]
        layout = {
            "xaxis": {"tickformat": ".0%", "rangemode": "tozero", "automargin": True, "fixedrange": True},
            "yaxis": marks.rows_axis(labels),
            "showlegend": False,
        }
        what = f"importance of the parameters of {one['method']}"
        pictures.append(marks.one(f"{key}-{place}", data, layout, 80 + 24 * len(ordered), what, labels))
    return pictures
