"""How good the winner is that a run chooses, and what it says of it: prints results/winner.md.

    python -m scripts.bench.record_matrix tests/data/zoo1/search.yaml tests/data/zoo_matrix.npz --random 40 --tpe 30
    python -m scripts.bench.record_matrix RUN tests/data/soups.npz --holdout 200
    python -m scripts.bench.winner

Over simulated searches the truth is known. Of a recording, some documents are drawn as those of the search, and the
figure on all others is the truth; its own noise is added to the intervals that it is compared with.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.expected import Expected, expect
from mergesearch.evaluate.scores import DocumentScores
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of
from scripts.bench.shared.replay import Matrix

DATA = Path(__file__).parents[2] / "tests" / "data"
SIZES = (25, 50, 100, 200)
Documents = Mapping[str, DocumentScores]
INTRODUCTION = """\
# The winner: the best expected score against the highest

`python -m scripts.bench.winner --draws {draws} --searches {searches}`; {about}.

A run ranks its trials by what they are expected to score on documents that no search saw (`evaluate/expected.py` has
the derivation). *Highest*, *chosen*, *best there is*: the true objective of the trial with the highest score, of the
one with the highest expectation, and of the truly best one, means over the draws; *gain*: chosen less highest, ± one
standard error over draws. *Bias*: of the figure that is told of the winner, in its own standard errors (for *highest*
the score itself, in the same unit), what all trials share in a draw left out, since that is the luck of the documents
and of nobody's choice; *share of 95 %*: how often the interval holds the truth, of the winner and of all trials.
"""


@dataclass(frozen=True)
class Draw:
    """One search whose truth is known.

    Attributes:
        candidates: their documents.
        factors: of each task.
        truth: [candidates], float64.
        wider: by what an interval has to be wider for the truth's own noise.
    """

    candidates: Sequence[Documents]
    factors: Mapping[str, float]
    truth: np.ndarray
    wider: float = 1.0


@dataclass(frozen=True)
class Found:
    """What came of one draw; see the page's introduction."""

    highest: float
    chosen: float
    best: float
    bias_of_score: float
    bias: float
    covered: bool
    covered_of_all: float
    seconds: float


def look(draw: Draw) -> Found:
    """Chooses a winner both ways."""
    start = time.perf_counter()
    expected = expect(draw.candidates, draw.factors)
    seconds = time.perf_counter() - start
    scores = np.array([score(candidate, draw.factors) for candidate in draw.candidates])
    values = np.array([each.value for each in expected])
    # whoever was stopped cannot win
    sizes = np.array([sum(len(each.ids) for each in candidate.values()) for candidate in draw.candidates])
    whole = sizes == sizes.max()
    highest, chosen = (int(np.where(whole, each, -np.inf).argmax()) for each in (scores, values))
    # what the better half has in common: bad trials are bad on other documents
    better = draw.truth >= np.median(draw.truth)
    shared = float(np.median((scores - draw.truth)[better & whole]))
    inside = [_holds(each, truth, draw.wider) for each, truth in zip(expected, draw.truth, strict=True)]
    return Found(
        float(draw.truth[highest]),
        float(draw.truth[chosen]),
        float(draw.truth.max()),
        (float(scores[highest] - draw.truth[highest]) - shared) / expected[highest].stderr,
        (float(values[chosen] - draw.truth[chosen]) - shared) / expected[chosen].stderr,
        inside[chosen],
        float(np.mean(inside)),
        seconds,
    )


def score(candidate: Documents, factors: Mapping[str, float]) -> float:
    """The objective on the documents at hand, but for where its scale begins."""
    return sum(
        factor * statistics.figure(candidate[task].values, candidate[task].aggregation)
        for task, factor in factors.items()
    )


def _holds(expected: Expected, truth: float, wider: float) -> bool:
    return abs(expected.value - truth) <= wider * (expected.high - expected.low) / 2


# --- simulated searches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A search on one task, whose trials are right or wrong on documents.

    Attributes:
        name: in words.
        trials: how many.
        documents: of the search.
        spread: of the true accuracies of the contenders, their standard deviation.
        bad: how many further trials are far behind.
        gold: whether answers hold how probable what is right is.
        stopped: the share of trials that a race stopped after a quarter of the documents.
    """

    name: str
    trials: int
    documents: int
    spread: float
    bad: int = 0
    gold: bool = True
    stopped: float = 0.0

    def draw(self, seed: int) -> Draw:
        """A candidate's margin on a document: its skill, the document's difficulty, and what the two make of each
        other; what is right is more probable by the logistic of the margin, and chosen where that is above a half."""
        rng = np.random.default_rng(seed)
        skill = np.concatenate([rng.normal(0, self.spread, self.trials), rng.normal(-0.8, 0.4, self.bad)]) * 2.5
        truth = _accuracy(skill)
        n, count = self.documents, self.trials + self.bad
        margin = skill[:, None] + rng.normal(0, 1.2, n) + rng.normal(0, 0.6, (count, n))
        right = (margin > 0).astype(np.float64)
        logs = -np.logaddexp(0.0, -margin)
        few = rng.random(count) < self.stopped
        few[: max(2, self.trials // 4)] = False
        order = rng.permutation(n)
        candidates = []
        for row in range(count):
            ids = np.sort(order[: n // 4]) if few[row] else np.arange(n)
            gold = logs[row, ids] if self.gold else None
            candidates.append({"quiz": DocumentScores(ids.tolist(), right[row, ids], "mean", gold)})
        return Draw(candidates, {"quiz": 1.0}, truth)


def _accuracy(skill: np.ndarray) -> np.ndarray:
    """Of a margin that is normal around the skill, the chance to be above 0."""
    spread = math.hypot(1.2, 0.6)
    return np.array([0.5 * (1 + math.erf(each / spread / math.sqrt(2))) for each in skill.tolist()])


WORLDS = [
    World("equal trials", 40, 200, 0.0),
    World("equal trials, no gold", 40, 200, 0.0, gold=False),
    World("alike", 40, 200, 0.03),
    World("alike, no gold", 40, 200, 0.03, gold=False),
    World("alike, and bad ones", 30, 200, 0.03, bad=60),
    World("alike, half of them raced", 60, 200, 0.03, stopped=0.5),
    World("far apart", 40, 200, 0.15),
    World("few trials", 8, 100, 0.05),
    World("many trials, few documents", 300, 60, 0.03, bad=100),
]


# --- recordings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """Scores of one search on the documents of both sides, as `record_matrix` writes them.

    Attributes:
        search: on the search documents.
        unseen: on the others, by task, [trials, n] or [trials, n, 2].
    """

    search: Matrix
    unseen: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Recording:
        search = Matrix.read(path)
        with np.load(path) as found:
            return cls(search, {task: found[f"{task}.holdout"].astype(np.float64) for task in search.values})

    def draw(self, size: int, seed: int, only: Sequence[int] | None = None, gold: bool = True) -> Draw:
        """A search on `size` of each task's search documents; the truth is what all others say.

        Args:
            size: at most half of the search documents are taken.
            only: these trials.
            gold: whether the probabilities of what is right are known.
        """
        rng, rows = np.random.default_rng(seed), list(range(self.search.trials) if only is None else only)
        truth, wider = np.zeros(len(rows)), []
        candidates: list[dict[str, DocumentScores]] = [{} for _ in rows]
        for task, factor in self.search.factors.items():
            values, unseen = self.search.values[task][rows], self.unseen[task][rows]
            kind = self.search.aggregations[task]
            order = rng.permutation(values.shape[1])
            count = min(size, len(order) // 2)
            chosen, rest = np.sort(order[:count]), order[count:]
            logs = self.search.gold.get(task) if gold else None
            for row in range(len(rows)):
                known = None if logs is None else logs[rows[row], chosen]
                candidates[row][task] = DocumentScores(chosen.tolist(), values[row, chosen], kind, known)
                others = np.concatenate([values[row, rest], unseen[row]])
                truth[row] += factor * statistics.figure(others, kind)
            wider.append(count / (len(rest) + unseen.shape[1]))
        return Draw(candidates, self.search.factors, truth, math.sqrt(1 + float(np.mean(wider))))


# --- the page --------------------------------------------------------------------------------------------------------

TITLES = (
    *("highest", "chosen", "best there is", "gain", "bias of the score", "bias of what is told", "share of 95 %"),
    "of all trials",
)


def cells(found: Sequence[Found]) -> list[str]:
    """Of one row, under `TITLES`."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(each, name) for each in found]))

    def stderr(values: Sequence[float]) -> float:
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    gains = [each.chosen - each.highest for each in found]
    biases = [each.bias for each in found]
    return [
        *(f"{mean(name):.4f}" for name in ("highest", "chosen", "best")),
        *(f"{np.mean(gains):+.4f} ± {stderr(gains):.4f}", f"{mean('bias_of_score'):+.2f}"),
        f"{np.mean(biases):+.2f} ± {stderr(biases):.2f}",
        *(f"{mean(name):.1%}" for name in ("covered", "covered_of_all")),
    ]


def simulated(searches: int) -> Iterator[str]:
    yield from ["## Simulated searches", ""]
    yield "One task, right or wrong; the accuracies of the contenders have the standard deviation *spread*."
    yield ""
    rows = []
    for world in WORLDS:
        found = [look(world.draw(seed)) for seed in range(searches)]
        trials = f"{world.trials}{f' + {world.bad}' if world.bad else ''}"
        rows.append([world.name, trials, world.documents, world.spread, *cells(found)])
    yield from [*tables.table(("searches", "trials", "documents", "spread", *TITLES), rows), ""]


def recorded(path: Path, draws: int) -> Iterator[str]:
    recording = Recording.read(path)
    search, sizes = recording.search, recording.search.sizes()
    told = ", ".join(f"{size} of {task}" for task, size in sizes.items())
    yield from [f"## {path.name}", "", f"{search.trials} trials; search documents: {told}.", ""]
    rows = []
    half = min(sizes.values()) // 2
    parts: list[tuple[str, Sequence[int] | None, bool]] = [("all", None, True), ("all", None, False)]
    if search.random:
        late = range(search.baselines + search.random, search.trials)
        parts.append(("TPE's alone", late, True))
    for name, only, gold in parts:
        for size in dict.fromkeys(min(size, half) for size in SIZES):
            found = [look(recording.draw(size, seed, only, gold)) for seed in range(draws)]
            rows.append([name, "yes" if gold else "no", size, *cells(found)])
    yield from [*tables.table(("trials", "gold", "documents a task", *TITLES), rows), ""]


def time_of(trials: int, documents: int = 400) -> float:
    """Seconds of a processor for so many trials with four tasks' documents."""
    world = World("", trials, documents, 0.05)
    one = world.draw(0)
    tasks = [f"quiz{n}" for n in range(4)]
    candidates = [dict.fromkeys(tasks, each["quiz"]) for each in one.candidates]
    start = time.process_time()
    expect(candidates, dict.fromkeys(tasks, 1.0))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recordings = [file for name in ("zoo_matrix.npz", "soups.npz") if (file := DATA / name).is_file()]
    parser.add_argument("matrix", type=Path, nargs="*", default=recordings)
    parser.add_argument("--draws", type=int, default=50, help="of each recording and size")
    parser.add_argument("--searches", type=int, default=200, help="simulated, a row")
    parser.add_argument("--out", type=Path, default=Path("results/winner.md"))
    chosen = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mergesearch", "numpy"))
    about = f"{datetime.date.today()}, python {platform.python_version()}, {libraries}"
    lines = [INTRODUCTION.format(draws=chosen.draws, searches=chosen.searches, about=about)]
    for each in chain(simulated(chosen.searches), *(recorded(path, chosen.draws) for path in chosen.matrix)):
        lines.append(each)
        print(each, file=sys.stderr, flush=True)
    lines += [f"1,000 trials with 400 documents on each of four tasks take {time_of(1000):.1f} s of one processor.", ""]
    chosen.out.write_text("\n".join([*lines[:-1], *notes_of(chosen.out), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
