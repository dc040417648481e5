"""The table of results/search-real.md, for the picture and for the README."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "results" / "search-real.md"
AVERAGE, BASE = "average", "base"
_WINNER = "**"
_INTERVAL = re.compile(r"(\d\.\d+) \[(\d\.\d+), (\d\.\d+)\]")


@dataclass(frozen=True)
class Candidate:
    """One row: on the holdout, the mean of the tasks with its 95 % interval, and each task.

    Attributes:
        winner: what the search would export.
        proposed: a proposal of the search, the winner among them; else a baseline.
    """

    name: str
    winner: bool
    proposed: bool
    search: float
    holdout: float
    low: float
    high: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class RealResult:
    """What the page compares, best first within each kind.

    Attributes:
        models: the single models.
        defaults: the methods' published defaults.
    """

    winner: Candidate
    defaults: list[Candidate]
    average: Candidate
    models: list[Candidate]
    base: Candidate


def read(page: Path = PAGE) -> RealResult:
    """The first table of the page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| candidate"))
    titles, _, *rows = [_cells(line) for line in lines[first : lines.index("", first)]]
    tasks = titles[3:]
    candidates = [_candidate(row, tasks) for row in rows]
    by_name = {candidate.name: candidate for candidate in candidates}
    # a single model is called as the task that it learned
    models = [candidate for candidate in candidates if candidate.name in tasks]
    known = {AVERAGE, BASE, *(model.name for model in models)}
    defaults = [c for c in candidates if c.name not in known and not c.proposed]
    best = sorted(defaults, key=lambda c: -c.holdout), sorted(models, key=lambda c: -c.holdout)
    winner = next(candidate for candidate in candidates if candidate.winner)
    return RealResult(winner, best[0], by_name[AVERAGE], best[1], by_name[BASE])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _candidate(row: list[str], tasks: list[str]) -> Candidate:
    name, search, holdout, *scores = (cell.replace(_WINNER, "") for cell in row)
    found = _INTERVAL.fullmatch(holdout)
    if found is None:
        raise ValueError(f"{PAGE}: {holdout!r} is no figure with its interval")
    value, low, high = map(float, found.groups())
    by_task = dict(zip(tasks, map(float, scores), strict=True))
    winner = row[0].startswith(_WINNER)
    return Candidate(name, winner, name.startswith("trial "), float(search), value, low, high, by_task)


def rounded(score: float) -> str:
    """To two places, halves up: scores are counts of documents, so halves are common."""
    return str(Decimal(str(score)).quantize(Decimal("0.01"), ROUND_HALF_UP))
