"""Intervals and tests for several candidates scored on the same documents; numpy only.

Every figure is theta = g(sum(a) / sum(b)) over documents (see `statistics`), and a measure is a linear combination of
the tasks' figures, such as the objective. Documents are resampled task by task, the same ones for every candidate.

- Intervals: the paired bootstrap over documents, stratified by task, percentiles of the draws (Efron and Tibshirani, An
  Introduction to the Bootstrap, 1993, chapter 13; Koehn, Statistical Significance Tests for Machine Translation
  Evaluation, EMNLP 2004). A ratio is resampled as the ratio of its resampled sums.
- p-values: the paired randomisation test (Noreen, Computer-Intensive Methods for Testing Hypotheses, 1989; Dror et al.,
  The Hitchhiker's Guide to Testing Statistical Significance in NLP, ACL 2018, section 3): where two candidates are
  equal, every document's two results could as well be swapped. It is exact for any number of documents and any number
  of draws (Phipson and Smyth, 2010), which the bootstrap is not where two candidates differ on a handful of documents.
- Several comparisons: Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Statist. 6, 1979.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.scores import DocumentScores

DRAWS = 10_000
CHUNK = 1 << 21  # numbers drawn at a time: 16 MiB
TIE = 1e-9  # relative: sums of the same numbers in another order count as equal

Measure = Mapping[str, float]  # task -> its factor


@dataclass(frozen=True, eq=False)
class Sample:
    """One task's values of K candidates on the same n documents.

    Attributes:
        values: float64, [K, n], or [K, n, 2] (numerator, denominator) for ratios of sums.
        aggregation: one of `statistics.AGGREGATIONS`.
    """

    values: np.ndarray
    aggregation: str

    @classmethod
    def of(cls, candidates: Sequence[DocumentScores]) -> Sample:
        """The documents that all candidates have a value for, in one order."""
        common = sorted(set.intersection(*(set(scores.ids) for scores in candidates)))
        rows = []
        for scores in candidates:
            place = {document: position for position, document in enumerate(scores.ids)}
            rows.append(scores.values[[place[document] for document in common]])
        return cls(np.asarray(rows, dtype=np.float64), candidates[0].aggregation)

    def units(self) -> np.ndarray:
        """[parts, n, K]: what is resampled: documents, or the groups of documents of a jackknife. parts is 2 for ratios
        (numerators, denominators), else 1."""
        if self.aggregation == statistics.JACKKNIFE:
            return statistics.one_a_group(self.values.T)[None]
        return self.values.T[None] if self.values.ndim == 2 else np.moveaxis(self.values, 0, -1).swapaxes(0, 1)

    def figures(self) -> np.ndarray:
        """[K] figures of the documents as they are."""
        units = self.units()
        return _figures(units.sum(axis=1), units.shape[1], self.aggregation)


def _figures(sums: np.ndarray, count: int, aggregation: str) -> np.ndarray:
    """[parts, ...] sums over `count` units -> [...] figures."""
    return statistics.from_ratio(sums[0] / (sums[1] if len(sums) == 2 else count), aggregation)


def stream(*key: object) -> np.random.PCG64:
    """A PCG64 whose numbers depend on the key alone; its raw stream is the same in every version of numpy."""
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "big"))


def bootstrap(sample: Sample, draws: int, bits: np.random.PCG64) -> np.ndarray:
    """Figures of resampled documents.

    Returns:
        [draws, K] float64; in each row all candidates have the same documents.
    """
    units = sample.units()
    count = units.shape[1]
    parts = [np.stack([counts @ part for part in units]) for counts in _counts(bits, draws, count)]
    return _figures(np.concatenate(parts, axis=1), count, sample.aggregation)


def randomise(
    sample: Sample, pairs: Sequence[tuple[int, int]], draws: int, bits: np.random.PCG64
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of pairs of candidates after swapping their results on a random half of the documents.

    Args:
        pairs: C pairs (ours, theirs) of positions in the sample.

    Returns:
        The observed differences, [C], and the randomised ones, [draws, C]; float64.
    """
    units = sample.units()
    ours, theirs = units[..., [a for a, _ in pairs]], units[..., [b for _, b in pairs]]
    middle, half = (ours + theirs).sum(axis=1) / 2, (ours - theirs) / 2

    def differences(swing: np.ndarray) -> np.ndarray:
        """[parts, ...] sums of the halves, each with its sign -> differences of figures."""
        center = middle.reshape(len(middle), *[1] * (swing.ndim - 2), -1)
        count = units.shape[1]
        above, below = center + swing, center - swing
        return _figures(above, count, sample.aggregation) - _figures(below, count, sample.aggregation)

    swings = [np.stack([signs @ part for part in half]) for signs in _signs(bits, draws, units.shape[1])]
    return differences(half.sum(axis=1)), differences(np.concatenate(swings, axis=1))


def _counts(bits: np.random.PCG64, draws: int, count: int) -> Iterator[np.ndarray]:
    """[some draws, count] how often each unit is drawn."""
    for size in _chunks(draws, count):
        numbers = bits.random_raw((size * count + 1) // 2).view(np.uint32)[: size * count].astype(np.uint64)
        chosen = ((numbers * count) >> 32).astype(np.int64).reshape(size, count)
        flat = (chosen + count * np.arange(size)[:, None]).ravel()
        yield np.bincount(flat, minlength=size * count).reshape(size, count).astype(np.float64)


def _signs(bits: np.random.PCG64, draws: int, count: int) -> Iterator[np.ndarray]:
    """[some draws, count] of +1 and -1."""
    for size in _chunks(draws, count):
        raw = bits.random_raw((size * count + 63) // 64).view(np.uint8)
        yield np.unpackbits(raw, count=size * count).reshape(size, count) * 2.0 - 1.0


def _chunks(draws: int, count: int) -> Iterator[int]:
    step = max(1, CHUNK // max(count, 1))
    for start in range(0, draws, step):
        yield min(step, draws - start)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(observed: float, randomised: np.ndarray) -> float:
    """Two-sided: the share of draws, the observed one among them, that are as far from 0 as the observed difference."""
    far = int(np.sum(np.abs(randomised) >= abs(observed) * (1 - TIE)))
    return (1 + far) / (1 + len(randomised))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that rejecting those below a level keeps the chance of any false rejection below it."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted


class Resampling:
    """K candidates on several tasks: intervals and tests of any measure, from one set of draws.

    Args:
        samples: by task; candidates in the same order everywhere.
        seed: of the draws.
        draws: how many.
    """

    def __init__(self, samples: Mapping[str, Sample], seed: int, draws: int = DRAWS):
        self._samples = samples
        self._seed = seed
        self._draws = draws
        self._figures = {task: sample.figures() for task, sample in samples.items()}
        self._boot = {task: bootstrap(s, draws, stream("bootstrap", seed, task)) for task, s in samples.items()}

    def spread(self, measure: Measure, candidate: int) -> tuple[float, float] | None:
        """How far the ends of the 95 % interval lie from the candidate's figure (below it negative, above positive)."""
        factors = {candidate: 1.0}
        return _ends(self._observed(measure, factors), self._resampled(measure, factors))

    def difference(self, measure: Measure, ours: int, theirs: int) -> float:
        """The measure of ours minus theirs."""
        return self._observed(measure, {ours: 1.0, theirs: -1.0})

    def difference_spread(self, measure: Measure, ours: int, theirs: int) -> tuple[float, float] | None:
        """As `spread`, of the paired difference."""
        factors = {ours: 1.0, theirs: -1.0}
        return _ends(self._observed(measure, factors), self._resampled(measure, factors))

    def p_values(self, measures: Sequence[Measure], pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Two-sided p-values of measures (rows) and pairs (columns); NaN where a task's documents have no values."""
        randomised = {
            task: randomise(sample, pairs, self._draws, stream("randomise", self._seed, task))
            for task, sample in self._samples.items()
        }
        p = np.full((len(measures), len(pairs)), np.nan)
        for row, measure in enumerate(measures):
            observed = _added(factor * randomised[task][0] for task, factor in measure.items())
            draws = _added(factor * randomised[task][1] for task, factor in measure.items())
            for column in range(len(pairs)):
                if np.isfinite(observed[column]):
                    p[row, column] = p_value(observed[column], draws[:, column])
        return p

    def _observed(self, measure: Measure, factors: Mapping[int, float]) -> float:
        return float(sum(f * g * self._figures[task][k] for task, f in measure.items() for k, g in factors.items()))

    def _resampled(self, measure: Measure, factors: Mapping[int, float]) -> np.ndarray:
        return _added(f * g * self._boot[task][:, k] for task, f in measure.items() for k, g in factors.items())


def _added(terms: Iterable[np.ndarray]) -> np.ndarray:
    return cast(np.ndarray, sum(terms))


def _ends(observed: float, draws: np.ndarray) -> tuple[float, float] | None:
    if not np.isfinite(observed):
        return None
    low, high = interval(draws)
    return low - observed, high - observed
