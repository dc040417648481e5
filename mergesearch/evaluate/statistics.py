"""Standard errors of benchmark figures and of differences between two systems; numpy only.

Every figure is theta = g(r) with r = sum(a) / sum(b) over documents (b = 1 for means), or an arbitrary function of the
documents that was turned into jackknife pseudo-values. Both have influence values u (one number for each document, or
for each group of documents), and then, after the delta method, in first order

    se(theta)            = sd(u) / sqrt(n)
    se(theta_1-theta_2)  = sd(u_1 - u_2) / sqrt(n)       on the same documents

with sd the sample standard deviation (n - 1). Sources: Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6 (ratios);
Casella and Berger, Statistical Inference, 2nd ed. 2002, section 5.5.4 (delta method); Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 11 (jackknife); Kott, The delete-a-group jackknife, Journal of Official
Statistics 17(4), 2001; Miller, Adding Error Bars to Evals, arXiv:2411.00640 (paired differences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A figure that is a smooth function g(r) of a ratio of sums r, or of a mean: g and its derivative.
_SMOOTH: dict[str, tuple[Callable[[Any], Any], Callable[[float], float]]] = {
    "mean": (lambda r: r, lambda r: 1.0),
    "weighted_mean": (lambda r: r, lambda r: 1.0),
    "perplexity": (lambda r: np.exp(-r), lambda r: -math.exp(-r)),
    "weighted_perplexity": (lambda r: np.exp(-r), lambda r: -math.exp(-r)),
    "bits_per_byte": (lambda r: -r / math.log(2), lambda r: -1 / math.log(2)),
}
JACKKNIFE = "jackknife"
AGGREGATIONS = (*_SMOOTH, JACKKNIFE)
MOST_GROUPS = 100


@dataclass(frozen=True)
class Difference:
    """A paired difference, ours - theirs, in the metric's unit; its standard error; the number of documents."""

    value: float
    stderr: float | None
    documents: int


def mean(values: Sequence[float] | np.ndarray) -> float:
    """The arithmetic mean, summed in order as lm-eval does, so that equal values give equal bits.

    Args:
        values: n >= 1 numbers.
    """
    numbers = _numbers(values)
    return sum(numbers) / len(numbers)


def mean_stderr(values: Sequence[float] | np.ndarray) -> float | None:
    """The standard error of the mean, sd / sqrt(n) with n - 1 inside sd: lm-eval's `mean_stderr`, bit for bit.

    Args:
        values: numbers; fewer than 2 have no standard error (None).
    """
    numbers = _numbers(values)
    if len(numbers) < 2:
        return None
    center = sum(numbers) / len(numbers)
    spread = math.sqrt(sum((number - center) ** 2 for number in numbers) / (len(numbers) - 1))
    return spread / math.sqrt(len(numbers))


def pooled_stderr(values: Sequence[float] | np.ndarray, strata: Sequence[int] | np.ndarray) -> float | None:
    """The standard error of the mean over the documents of a group of tasks, from the spread within each task.

    sqrt(sum over tasks of the squared deviations from the task's mean / (n - tasks) / n): what lm-eval reports for a
    group with `weight_by_size` (its `pooled_sample_stderr`; https://en.wikipedia.org/wiki/Pooled_variance).

    Args:
        values: [n] numbers.
        strata: [n] the task that each belongs to.
    """
    values, strata = np.asarray(values, dtype=np.float64), np.asarray(strata)
    names = np.unique(strata)
    if len(values) <= len(names):
        return None
    squares = sum(float(np.sum((part - part.mean()) ** 2)) for part in (values[strata == name] for name in names))
    return math.sqrt(squares / (len(values) - len(names)) / len(values))


def figure(values: np.ndarray, aggregation: str) -> float:
    """The benchmark's figure from per-document values.

    Args:
        values: [n], or [n, 2] (numerator, denominator) for ratios of sums; float64.
        aggregation: one of AGGREGATIONS. For `jackknife` the result is the bias-corrected estimate, the mean of the
            pseudo-values, which is close to, not equal to, the metric itself.
    """
    if aggregation == JACKKNIFE:
        return mean(one_a_group(values))
    return float(from_ratio(_ratio(values), aggregation))


def from_ratio(ratio: Any, aggregation: str) -> Any:
    """g(r): the figure that a mean, or a ratio of sums, stands for.

    Args:
        ratio: a number or an array of them, float64.
        aggregation: one of AGGREGATIONS; for `jackknife` r is the mean of the groups' pseudo-values.
    """
    if aggregation == JACKKNIFE:
        return ratio
    transform, _ = _smooth(aggregation)
    return transform(ratio)


def influence(values: np.ndarray, aggregation: str) -> np.ndarray:
    """How far each document (for `jackknife`: each group of documents) moves the figure, up to a common constant.

    g'(r) * (a_i - r * b_i) / mean(b) for a ratio of sums r = sum(a) / sum(b) under g; the values themselves for a plain
    mean; the groups' pseudo-values for `jackknife`.

    Args:
        values: [n] or [n, 2], float64, as in `figure`.

    Returns:
        [n], or [at most MOST_GROUPS] for `jackknife`; float64, in the figure's unit.
    """
    values = np.asarray(values, dtype=np.float64)
    if aggregation == JACKKNIFE:
        return one_a_group(values)
    if aggregation == "mean":
        return values
    _, slope = _smooth(aggregation)
    ratio = _ratio(values)
    if values.ndim == 1:
        return slope(ratio) * values
    return slope(ratio) * (values[:, 0] - ratio * values[:, 1]) / values[:, 1].mean()


def standard_error(values: np.ndarray, aggregation: str) -> float | None:
    """The standard error of `figure(values, aggregation)`, sd(influence) / sqrt(n); None below 2 documents."""
    return mean_stderr(influence(values, aggregation))


def difference(ours: np.ndarray, theirs: np.ndarray, aggregation: str) -> Difference:
    """The paired difference of two systems on the same documents in the same order.

    Its variance leaves out what the documents have in common: sd(u_ours - u_theirs) / sqrt(n), smaller than
    sqrt(se_ours^2 + se_theirs^2) wherever the two systems find the same documents hard.

    Args:
        ours, theirs: [n] or [n, 2] each, float64, as in `figure`.

    Raises:
        ValueError: the two cover different numbers of documents.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"a paired difference needs the same documents on both sides: {ours.shape}, {theirs.shape}")
    value = figure(ours, aggregation) - figure(theirs, aggregation)
    stderr = mean_stderr(influence(ours, aggregation) - influence(theirs, aggregation))
    return Difference(value, stderr, len(ours))


def jackknife_values(items: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> np.ndarray:
    """Pseudo-values of any figure by the delete-a-group jackknife, one for each document.

    Document i belongs to group i mod G, with G <= MOST_GROUPS groups whose sizes differ by at most one; its value is
    p_g = G * theta - (G - 1) * theta_(g), theta_(g) the figure without group g. With G = n this is the ordinary
    jackknife. sd(p) / sqrt(G) is the jackknife's standard error, sqrt((G-1)/G * sum (theta_(g) - mean theta_(.))^2).

    Args:
        items: n per-document items of any type that `aggregate` takes; nothing is random, so the order decides.
        aggregate: the figure of a list of items. Called at most MOST_GROUPS + 1 times.

    Returns:
        [n] float64; all of them the figure itself where n < 2.
    """
    items = list(items)
    theta = float(aggregate(items))
    groups = _groups(len(items))
    if groups < 2:
        return np.full(len(items), theta)
    member = np.arange(len(items)) % groups
    without = [float(aggregate([item for item, g in zip(items, member, strict=True) if g != k])) for k in range(groups)]
    return (groups * theta - (groups - 1) * np.array(without))[member]


def _groups(documents: int) -> int:
    return math.ceil(documents / math.ceil(documents / MOST_GROUPS)) if documents else 0


def one_a_group(values: np.ndarray) -> np.ndarray:
    """[n, ...] pseudo-values of documents -> [G, ...] of groups: the first G documents are in G different groups."""
    return np.asarray(values, dtype=np.float64)[: _groups(len(values))]


def _ratio(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=np.float64)
    return mean(values) if values.ndim == 1 else sum(values[:, 0].tolist()) / sum(values[:, 1].tolist())


def _smooth(aggregation: str) -> tuple[Callable[[float], float], Callable[[float], float]]:
    if aggregation not in _SMOOTH:
        raise ValueError(f"unknown aggregation {aggregation!r} (known: {', '.join(AGGREGATIONS)})")
    return _SMOOTH[aggregation]


def _numbers(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.asarray(values, dtype=np.float64).tolist()
