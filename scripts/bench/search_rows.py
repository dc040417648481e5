"""What finished searches came to, as rows of a CSV file that is committed: results/search.csv.

A row is a moment at which a search had something better: what it had spent, its highest score on the search documents,
and the holdout score of whom it would have given then. The last row of a search, its `end`, is what it spent in all,
and says what the candidate was that it gave, its `best`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from scripts.bench.yardstick import Candidate

COLUMNS = (
    "pool", "search", "seed", "settings", "budget", "commit", "documents", "seconds", "search_score", "holdout_score",
    "end", "best",
)  # fmt: skip

THEN = " then "


@dataclass(frozen=True, order=True)
class Key:
    """One search with one seed on one pool."""

    pool: str
    search: str
    seed: int


@dataclass(frozen=True)
class Point:
    """A moment of a search.

    Attributes:
        documents: document evaluations so far.
        seconds: of building, learning and scoring so far; NaN where that was not recorded.
        search: the highest score on the search documents.
        holdout: of whom the search would give now; NaN where it was not measured.
    """

    documents: int
    seconds: float
    search: float
    holdout: float


@dataclass(frozen=True)
class Curve:
    """How a search became better.

    Attributes:
        points: in order.
        documents, seconds: in all.
        settings: tells whether it was another search under the same name.
        budget: the documents that it was allowed.
        commit: of the code that ran it, with a + where files differed from it; several with `THEN` between them where
            it was cut short and went on with another; empty where that was not recorded.
        best: what the candidate is that it gave in the end, in words; empty where that was not recorded, and of a
            yardstick, which has candidates of one kind.
    """

    points: Sequence[Point] = field(default_factory=list)
    documents: int = 0
    seconds: float = math.nan
    settings: str = ""
    budget: int = 0
    commit: str = ""
    best: str = ""

    def at(self, documents: float) -> tuple[float, float]:
        """(highest search score, holdout score) after so many document evaluations; NaN before any."""
        reached = [point for point in self.points if point.documents <= documents]
        return (reached[-1].search, reached[-1].holdout) if reached else (math.nan, math.nan)

    def cost_of(self, score: float) -> float:
        """Document evaluations until the highest search score is at least `score`; infinite where it never is."""
        return next((float(point.documents) for point in self.points if point.search >= score), math.inf)

    @property
    def each(self) -> int:
        """Documents of the first candidate."""
        return self.points[0].documents if self.points else 0


Curves = Mapping[Key, Curve]


def curve_of(candidates: Iterable[Candidate], settings: str = "", budget: int = 0) -> Curve:
    """Of a search that gives whoever has the highest score."""
    points, documents, seconds, best = [], 0, 0.0, -math.inf
    for candidate in candidates:
        documents += candidate.documents
        seconds += candidate.seconds
        if candidate.value is not None and candidate.value > best:
            best = candidate.value
            holdout = math.nan if candidate.holdout is None else candidate.holdout
            points.append(Point(documents, seconds, best, holdout))
    return Curve(points, documents, seconds, settings, budget)


def read(path: Path) -> dict[Key, Curve]:
    """The finished searches in a file; what has no end is left out."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[Key, list[Point]] = {}
    curves: dict[Key, Curve] = {}
    for row in rows:
        key = Key(row["pool"], row["search"], int(row["seed"]))
        point = Point(
            int(row["documents"]), _number(row["seconds"]), _number(row["search_score"]), _number(row["holdout_score"])
        )
        if row["end"]:
            about = row["settings"], int(row["budget"]), row.get("commit", ""), row.get("best", "")
            curves[key] = Curve(found.pop(key, []), point.documents, point.seconds, *about)
        else:
            found.setdefault(key, []).append(point)
    return curves


def add(path: Path, key: Key, curve: Curve) -> None:
    """Writes a finished search into a file, in the place of the same one; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        write(path, {**read(path), key: curve})


def drop(path: Path, gone: Collection[Key]) -> None:
    """Takes searches out of a file, so that they are run again."""
    if not gone:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        write(path, {key: curve for key, curve in read(path).items() if key not in gone})


def write(path: Path, curves: Curves) -> None:
    """The whole file, or none."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key, curve in sorted(curves.items()):
            about = [key.pool, key.search, key.seed, curve.settings, curve.budget, curve.commit]
            writer.writerows([*about, *_cells(point), "", ""] for point in curve.points)
            last = curve.at(math.inf)
            writer.writerow([*about, *_cells(Point(curve.documents, curve.seconds, *last)), "end", curve.best])
    part.replace(path)


def _cells(point: Point) -> list[object]:
    seconds = "" if math.isnan(point.seconds) else round(point.seconds, 1)
    return [point.documents, seconds, *("" if math.isnan(n) else n for n in (point.search, point.holdout))]


def _number(text: str) -> float:
    return float(text) if text else math.nan
