"""Racing: a candidate is scored block by block, and stopped once it can hardly beat the best finished one.

After each block, the objective on the documents so far is compared with the best finished trial's on the same documents
(a paired difference D with standard error s). The question is whether D on all search documents will come out above 0.
The documents are finitely many and the blocks are drawn from them without replacement: what is still open is the mean
of the rest, on which other finished trials were scored already, and what they did there helps to predict it
(`evaluate.prediction`). The prediction's standard error shrinks to nothing by the last block, by the finite population
correction sqrt(1 - n / N) (Cochran, Sampling Techniques, 3rd ed. 1977, section 2.6); Student's t with Satterthwaite's
degrees of freedom over the tasks gives the chance that D still comes out above 0. A candidate is stopped once that is
at most `error`.

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
from typing import Any, Protocol

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.prediction import predict
from mergesearch.evaluate.scores import DocumentScores, Scores
from mergesearch.search.store import write_atomically

Documents = Mapping[str, DocumentScores]

OTHERS = 8  # finished proposals beside the baselines that predictions are made from: more said no more


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


def lead(
    ours: Documents,
    theirs: Documents,
    factors: Mapping[str, float],
    sizes: Mapping[str, int],
    others: Sequence[Documents] = (),
) -> Lead:
    """How far ours will be before theirs on all documents, from those that ours was scored on.

    Args:
        ours, theirs: values by task; theirs covers all documents.
        factors: of each task's figure in the objective.
        sizes: the number of search documents of each task.
        others: more candidates that were scored on all documents: what they did on the documents still to come says
            something about ours, see `evaluate.prediction`.
    """
    value, parts = 0.0, []
    for task, factor in factors.items():
        difference, variance, freedom = _part(ours[task], theirs[task], [other[task] for other in others], sizes[task])
        value += factor * difference
        parts.append((factor**2 * variance, freedom))
    variance = sum(part for part, _ in parts)
    return Lead(value, math.sqrt(variance), _freedom(parts))


def _part(
    ours: DocumentScores, theirs: DocumentScores, others: Sequence[DocumentScores], size: int
) -> tuple[float, float, float]:
    """One task's difference, its variance, and the degrees of freedom of that."""
    aggregation, n = ours.aggregation, len(ours.ids)
    mine, place = _aligned(ours, theirs)
    value = statistics.figure(mine, aggregation) - statistics.figure(theirs.values[place], aggregation)
    if n == size:
        return value, 0.0, math.inf
    if n < 2:
        return value, math.inf, 0.0
    u, v = (statistics.influence(values, aggregation) for values in (mine, theirs.values[place]))
    known = _regressors(theirs, others, aggregation)
    predicted = predict(u - v, known[place], known.mean(axis=0))
    return value + predicted.shift, _variance(predicted.residuals, u, v) * (1 - n / size), predicted.freedom


def _regressors(theirs: DocumentScores, others: Sequence[DocumentScores], aggregation: str) -> np.ndarray:
    """[all documents, others]: how the others differ from theirs."""
    whole = statistics.influence(theirs.values, aggregation)
    return np.stack([*(statistics.influence(each.values, aggregation) - whole for each in others if
                       each.ids == theirs.ids)], axis=1) if others else np.zeros((len(whole), 0))  # fmt: skip


def spreads(candidates: Sequence[Documents], factors: Mapping[str, float]) -> dict[str, float]:
    """How far the objective's paired difference between candidates varies from document to document of each task.

    The root mean square over all pairs of the standard deviation of their difference, in the objective's unit: what
    `split_blocks` takes.

    Args:
        candidates: at least 2, scored on the same documents.
        factors: of each task's figure in the objective.
    """
    spread_of = {}
    for task, factor in factors.items():
        aggregation = candidates[0][task].aggregation
        values = np.stack([statistics.influence(each[task].values, aggregation) for each in candidates])
        # the mean over pairs of their difference's variance is twice the mean over documents of the variance between
        # candidates, what the candidates differ by on average left out
        centred = values - values.mean(axis=1, keepdims=True)
        spread_of[task] = abs(factor) * math.sqrt(2 * float(centred.var(axis=0, ddof=1).mean()))
    return spread_of


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Welch and Satterthwaite's degrees of freedom of a sum of variances, each with its own."""
    uncertain = [(variance, freedom) for variance, freedom in parts if variance > 0]
    if not uncertain or any(freedom < 1 for _, freedom in uncertain):
        return 0.0
    return sum(v for v, _ in uncertain) ** 2 / sum(v**2 / freedom for v, freedom in uncertain)


def _aligned(ours: DocumentScores, theirs: DocumentScores) -> tuple[np.ndarray, np.ndarray]:
    """Our values, and where theirs on the same documents are."""
    _, mine, place = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
    return ours.values[mine], place


def _variance(residuals: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The squared standard error of the predicted difference, as if one more document were as extreme as the most
    extreme so far: on few documents, those that make the difference may not have come up yet."""
    n = len(residuals)
    extreme = float(np.abs(residuals).max())
    # nothing differs so far: a document can differ by as much as the values do
    extreme = extreme or float(max(ours.max(), theirs.max()) - min(ours.min(), theirs.min()))
    return (float(np.sum(residuals**2)) + extreme**2) / (n - 1) / n


def quantile(error: float, freedom: float) -> float:
    """Student's upper quantile: what a t-distributed number exceeds with probability `error`.

    Args:
        error: in (0, 1).
        freedom: degrees of freedom, any real number from 1 on; below 1, where one document says next to nothing, the
            quantile is infinite.

    An expansion around the normal quantile (Abramowitz and Stegun 26.7.5) will not do: the first blocks leave few
    degrees, and at 1 degree and an error of 0.002 it gives 9.6 in place of 159.
    """
    if freedom < 1:
        return math.inf
    # scipy.stats.t.isf is this function with a second of imports and 0.1 ms a call around it
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, error))


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
    """The best finished trial, and others that are finished."""

    number: int
    documents: Documents
    others: Sequence[Documents] = ()


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


def answers_of(kept: Path, number: int) -> Path:
    """Where the answers to a block are, in the folder of its recipe."""
    return kept / f"{number:03d}.json"


def race(
    scorer: Blocks,
    best: Best | None,
    factors: Mapping[str, float],
    error: float,
    kept: Path,
    load: Callable[[], None],
    written: Callable[[Path], None] = lambda file: None,
) -> Outcome:
    """Scores the candidate until it is finished or cannot win. Blocks that were scored before are not scored again.

    Args:
        scorer: of the live model.
        best: whom it has to beat; None lets every candidate finish.
        factors: of each task's figure in the objective.
        error: stop a candidate whose chance to win is at most this.
        kept: where the answers to its blocks are kept, `BLOCK.json` each; must depend on the recipe alone.
        load: builds the candidate; called before the first block that has to be scored.
        written: told each file with the answers to a block.
    """
    seconds, loaded = 0.0, False
    last = scorer.count - 1
    for number in range(scorer.count):
        file = answers_of(kept, number)
        if not _restored(scorer, number, file):
            if not loaded:
                load()
                loaded = True
            seconds += scorer.score_block(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(scorer.answers(number)))
            written(file)
        if best is None or number == last:
            continue
        scores = scorer.collect(number + 1, seconds)
        behind = lead(scores.documents, best.documents, factors, scorer.sizes, best.others)
        if behind.upper(error) < 0:
            return Outcome(scores, number + 1, _why(scores, scorer.sizes, behind, best))
    return Outcome(scorer.collect(scorer.count, seconds), scorer.count)


def _restored(scorer: Blocks, number: int, file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        scorer.restore(number, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError):
        # answers to other blocks, as another version drew them, or a damaged file
        return False
    return True


def _why(scores: Scores, sizes: Mapping[str, int], behind: Lead, best: Best) -> str:
    seen = sum(len(documents.ids) for documents in scores.documents.values())
    return (
        f"after {seen} of {sum(sizes.values())} documents: {behind.value:+.4f} ± {behind.stderr:.4f} "
        f"against trial {best.number} on them"
    )
