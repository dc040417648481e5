"""Racing: a candidate is scored block by block, and stopped once it can hardly beat the best finished one.

After each block, the objective on the documents so far is compared with the best finished trial's on the same documents
(a paired difference D with standard error s). The question is whether D on all search documents will come out above 0.
These are finitely many and the blocks are drawn from them without replacement: what is still open is the mean of the
rest, and the difference on all documents is D with a standard error that shrinks to nothing by the last block, s with
the finite population correction sqrt(1 - n / N) (Cochran, Sampling Techniques, 3rd ed. 1977, section 2.6; Student's t
with Satterthwaite's degrees of freedom over the tasks). A candidate is stopped once the chance that it still comes out
above 0, predicted in this way, is at most `error`.

It may be looked at after every block without a correction for the number of looks: given what was seen, the predicted
chance of one fixed event is a martingale, so that among the candidates that were stopped at a chance of at most `error`
at most that share would have won, however often one looked (such rules are called stochastic curtailment: Jennison and
Turnbull, Group Sequential Methods, 2000, chapter 10). The chance is the model's, in which nothing is known of a
candidate beforehand: where all candidates are as good as the best one it is too small, and where most are worse, as in
searches, too large. results/racing.md says what comes of it over recorded scores. Nothing is ever stopped for being
good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
        freedom: degrees of freedom of the standard error; 0 where a task has one document.
    """

    value: float
    stderr: float
    freedom: float

    def upper(self, error: float) -> float:
        """What the difference on all search documents exceeds with probability `error` at most."""
        return self.value + quantile(error, self.freedom) * self.stderr if self.stderr else self.value


def lead(ours: Documents, theirs: Documents, factors: Mapping[str, float], sizes: Mapping[str, int]) -> Lead:
    """How far ours is before theirs on the documents that ours was scored on.

    Args:
        ours, theirs: values by task; theirs covers at least the documents of ours.
        factors: of each task's figure in the objective.
        sizes: the number of search documents of each task.
    """
    value, parts = 0.0, []
    for task, factor in factors.items():
        a, b = _aligned(ours[task], theirs[task])
        value += factor * (statistics.figure(a, ours[task].aggregation) - statistics.figure(b, ours[task].aggregation))
        rest = 1 - len(a) / sizes[task]
        parts.append((factor**2 * _variance(a, b, ours[task].aggregation) * rest if rest else 0.0, len(a)))
    variance = sum(part for part, _ in parts)
    return Lead(value, math.sqrt(variance), _freedom(parts))


def spreads(candidates: Sequence[Documents], factors: Mapping[str, float]) -> dict[str, float]:
    """How far the objective's paired difference between candidates varies from document to document of each task.

    The root mean square over all pairs of the standard deviation of their difference, in the objective's unit: what
    `split_blocks` takes.

    Args:
        candidates: at least 2, scored on the same documents.
        factors: of each task's figure in the objective.
    """
    found = {}
    for task, factor in factors.items():
        aggregation = candidates[0][task].aggregation
        values = np.stack([statistics.influence(each[task].values, aggregation) for each in candidates])
        # the mean over pairs of their difference's variance is twice the mean over documents of the variance between
        # candidates, what the candidates differ by on average left out
        centred = values - values.mean(axis=1, keepdims=True)
        found[task] = abs(factor) * math.sqrt(2 * float(centred.var(axis=0, ddof=1).mean()))
    return found


def _freedom(parts: Sequence[tuple[float, int]]) -> float:
    """Welch and Satterthwaite's degrees of freedom of a sum of variances, each with its number of documents."""
    open_ = [(variance, n) for variance, n in parts if variance > 0]
    if not open_ or any(n < 2 for _, n in open_):
        return 0.0
    return sum(v for v, _ in open_) ** 2 / sum(v**2 / (n - 1) for v, n in open_)


def _aligned(ours: DocumentScores, theirs: DocumentScores) -> tuple[np.ndarray, np.ndarray]:
    _, mine, other = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
    return ours.values[mine], theirs.values[other]


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


def quantile(error: float, freedom: float) -> float:
    """Student's upper quantile, z + (z^3 + z) / (4 nu) (Abramowitz and Stegun 26.7.5, first term)."""
    if freedom < 1:
        return math.inf
    z = NormalDist().inv_cdf(1 - error)
    return z + (z**3 + z) / (4 * freedom)


class Blocks(Protocol):
    """The part of `BlockScorer` that a race needs."""

    count: int
    sizes: Mapping[str, int]

    def arrange(self, spread: Mapping[str, float] | None) -> None: ...
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
        error: stop a candidate whose chance to win is at most this.
        kept: where the answers to its blocks are kept, `BLOCK.json` each; must depend on the recipe alone.
        load: builds the candidate; called before the first block that has to be scored.
    """
    seconds, loaded = 0.0, False
    last = scorer.count - 1
    for number in range(scorer.count):
        file = kept / f"{number:03d}.json"
        if not _restored(scorer, number, file):
            if not loaded:
                load()
                loaded = True
            seconds += scorer.score_block(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(scorer.answers(number)))
        if best is None or number == last:
            continue
        scores = scorer.collect(number + 1, seconds)
        found = lead(scores.documents, best.documents, factors, scorer.sizes)
        if found.upper(error) < 0:
            return Outcome(scores, number + 1, _why(scores, scorer.sizes, found, best))
    return Outcome(scorer.collect(scorer.count, seconds), scorer.count)


def _restored(scorer: Blocks, number: int, file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        scorer.restore(number, json.loads(file.read_text(encoding="utf-8")))
    except ValueError:
        # answers to other blocks, as another version drew them, or half a file
        return False
    return True


def _why(scores: Scores, sizes: Mapping[str, int], found: Lead, best: Best) -> str:
    seen = sum(len(documents.ids) for documents in scores.documents.values())
    return (
        f"after {seen} of {sum(sizes.values())} documents: {found.value:+.4f} ± {found.stderr:.4f} "
        f"against trial {best.number} on them"
    )
