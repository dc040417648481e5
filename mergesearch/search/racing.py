"""Racing: a candidate is scored block by block, and stopped once it can no longer beat the best finished one.

After each block, the objective on the documents so far is compared with the best finished trial's on the same documents
(a paired difference D with standard error s). The question is whether D on all search documents could still come out
above 0. These are finitely many and the blocks are drawn from them without replacement, so the error of D shrinks to
nothing by the last block: s carries the finite population correction (Cochran, Sampling Techniques, 3rd ed. 1977,
section 2.6). The limits D + q s after the blocks 1, 2, ... hold together with probability 1 - error (the error is
shared out equally over the looks, Bonferroni), so it may be looked at after every block: a confidence sequence on the
grid of looks. It is one-sided; nothing is ever stopped for being good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores, Scores
from mergesearch.search.store import write_atomically

Documents = Mapping[str, DocumentScores]


@dataclass(frozen=True)
class Lead:
    """The objective's paired difference to the best finished trial, on the documents so far.

    Attributes:
        value: ours minus theirs.
        stderr: for the difference on all search documents.
        fewest: documents of the task that has the fewest so far.
    """

    value: float
    stderr: float
    fewest: int

    def upper(self, error: float) -> float:
        """What the difference on all search documents exceeds with probability `error` at most."""
        return self.value + quantile(error, self.fewest - 1) * self.stderr


def lead(ours: Documents, theirs: Documents, factors: Mapping[str, float], sizes: Mapping[str, int]) -> Lead:
    """How far ours is before theirs on the documents that ours was scored on.

    Args:
        ours, theirs: values by task; theirs covers at least the documents of ours.
        factors: of each task's figure in the objective.
        sizes: the number of search documents of each task.
    """
    value, variance = 0.0, 0.0
    for task, factor in factors.items():
        a, b = _aligned(ours[task], theirs[task])
        value += factor * statistics.difference(a, b, ours[task].aggregation).value
        variance += factor**2 * _variance(a, b, ours[task].aggregation) * (1 - len(a) / sizes[task])
    return Lead(value, math.sqrt(max(variance, 0.0)), min(len(ours[task].ids) for task in factors))


def _aligned(ours: DocumentScores, theirs: DocumentScores) -> tuple[np.ndarray, np.ndarray]:
    place = {document: position for position, document in enumerate(theirs.ids)}
    both = [(position, place[document]) for position, document in enumerate(ours.ids) if document in place]
    return ours.values[[a for a, _ in both]], theirs.values[[b for _, b in both]]


def _variance(ours: np.ndarray, theirs: np.ndarray, aggregation: str) -> float:
    """The squared standard error of the paired difference, as if one more document were as extreme as the most extreme
    so far: on few documents, those that make the difference may not have come up yet."""
    u, v = (statistics.influence(values, aggregation) for values in (ours, theirs))
    n = len(u)
    if n < 2:
        return math.inf
    difference = u - v
    extreme = float(np.abs(difference - difference.mean()).max())
    # nothing differs so far: a document can differ by as much as the values do
    extreme = extreme or float(max(u.max(), v.max()) - min(u.min(), v.min()))
    return (float(np.sum((difference - difference.mean()) ** 2)) + extreme**2) / (n - 1) / n


def quantile(error: float, freedom: int) -> float:
    """Student's upper quantile, z + (z^3 + z) / (4 nu) (Abramowitz and Stegun 26.7.5, first term)."""
    if freedom < 1:
        return math.inf
    z = NormalDist().inv_cdf(1 - error)
    return z + (z**3 + z) / (4 * freedom)


class Blocks(Protocol):
    """The part of `BlockScorer` that a race needs."""

    count: int
    sizes: Mapping[str, int]

    def score_block(self, number: int) -> float: ...
    def collect(self, blocks: int, seconds: float = 0.0) -> Scores: ...
    def answers(self, number: int) -> list[list[Any]]: ...
    def restore(self, number: int, answers: list[list[Any]]) -> None: ...


@dataclass(frozen=True)
class Best:
    """The best finished trial."""

    number: int
    documents: Documents


@dataclass(frozen=True)
class Outcome:
    """What a race found.

    Attributes:
        scores: of all documents, or of those that the candidate was stopped after.
        blocks: how many it was scored on.
        stopped: why it was stopped; None for one that was scored to the end.
    """

    scores: Scores
    blocks: int
    stopped: str | None = None


def race(
    scorer: Blocks, best: Best | None, factors: Mapping[str, float], error: float, kept: Path, load: Callable[[], None]
) -> Outcome:
    """Scores the candidate until it is finished or cannot win. Blocks that were scored before are not scored again.

    Args:
        scorer: of the live model.
        best: whom it has to beat; None lets every candidate finish.
        factors: of each task's figure in the objective.
        error: the chance that a candidate that would have won is stopped.
        kept: where the answers to its blocks are kept, `BLOCK.json` each; must depend on the recipe alone.
        load: builds the candidate; called before the first block that has to be scored.
    """
    seconds, loaded = 0.0, False
    looks = scorer.count - 1
    for number in range(scorer.count):
        file = kept / f"{number:03d}.json"
        if not _restored(scorer, number, file):
            if not loaded:
                load()
                loaded = True
            seconds += scorer.score_block(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(scorer.answers(number)))
        if best is None or number == looks:
            continue
        scores = scorer.collect(number + 1, seconds)
        found = lead(scores.documents, best.documents, factors, scorer.sizes)
        if found.upper(error / looks) < 0:
            return Outcome(scores, number + 1, _why(scores, scorer.sizes, found, best))
    return Outcome(scorer.collect(scorer.count, seconds), scorer.count)


def _restored(scorer: Blocks, number: int, file: Path) -> bool:
    if not file.is_file():
        return False
    scorer.restore(number, json.loads(file.read_text(encoding="utf-8")))
    return True


def _why(scores: Scores, sizes: Mapping[str, int], found: Lead, best: Best) -> str:
    seen = sum(len(documents.ids) for documents in scores.documents.values())
    return (
        f"after {seen} of {sum(sizes.values())} documents: {found.value:+.4f} ± {found.stderr:.4f} "
        f"against trial {best.number} on them"
    )
