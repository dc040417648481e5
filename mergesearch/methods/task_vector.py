"""Methods on task vectors: d_i = x_i - base, made sparse, weighted, perhaps elected, summed, put back on the base.

The shared steps come first. Those that need a whole tensor (a threshold, a norm, ranks) are functions of their own that
return a statistic; what is left is elementwise. A density is read as a Python number, every other scalar may be a 0-d
float64 tensor. All tensors of one call have one shape, dtype (float32 or float64) and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import (
    Normalize,
    Scalar,
    Scalars,
    Weights,
    nonzero,
    per_model,
    scalar,
    total,
    weighted_sum,
)
from mergesearch.methods.listening import kth_smallest, statistic
from mergesearch.methods.masks import MaskKey, uniform
from mergesearch.methods.registry import Parameter, method

Densities = Annotated[
    Scalars,
    Parameter(
        per_model=True,
        low=0.0,
        high=1.0,
        low_open=True,
        search=(0.1, 1.0),
        meaning="the fraction of each task vector that is kept; 1 keeps all of it",
    ),
]
Lambda = Annotated[Scalar, Parameter(key="lambda", search=(0.5, 1.5), meaning="one scale on the merged task vector")]
TrimRescale = Annotated[
    str,
    Parameter(
        kind="choice",
        choices=("none", "l1"),
        meaning="l1: scale what was kept back to the L1 norm of the whole task vector",
    ),
]
DropRescale = Annotated[
    str,
    Parameter(
        kind="choice",
        choices=("inverse", "l1", "none"),
        meaning="inverse: divide by the probability of being kept (unbiased); l1: match the task vector's L1 norm",
    ),
]
Samples = Annotated[
    int, Parameter(kind="int", low=1, high=1024, meaning="average the dropped task vector over this many masks")
]

Divisor = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        meaning="what is kept is divided by this where rescale is inverse (DAREx-q); 0: by the chance of being kept",
    ),
]


def task_vectors(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """d_i = x_i - base."""
    return [model - base for model in models]


def keep_count(n: int, density: Scalar) -> int:
    """How many of n elements a density keeps: max(1, floor(density n)), n at most."""
    return min(n, max(1, int(float(density) * n)))


def magnitude_threshold(d: Tensor, count: int) -> Tensor:
    """The `count`-th largest magnitude of d, 0-d."""
    return kth_smallest(d.abs(), d.numel() - count + 1)


def trim(d: Tensor, density: Scalar) -> Tensor:
    """d with all but the largest magnitudes set to 0; elements equal to the smallest one kept are all kept."""
    count = keep_count(d.numel(), density)
    if count == d.numel():
        return d
    return torch.where(d.abs() >= magnitude_threshold(d, count), d, torch.zeros_like(d))


def match_l1(kept: Tensor, d: Tensor) -> Tensor:
    """`kept` scaled to the L1 norm of d; as it is where nothing was kept."""
    return kept * l1_factor(l1_norm(kept), l1_norm(d))


@statistic(how="sum")
def l1_norm(d: Tensor) -> Tensor:
    """The sum of magnitudes, summed in float64 so that it hardly depends on the order; 0-d."""
    return d.abs().sum(dtype=torch.float64)


def l1_factor(after: Tensor, before: Tensor) -> Tensor:
    """before / after, 1 where `after` is 0."""
    return torch.where(after > 0, before / after, torch.ones_like(after))


def drop(
    d: Tensor, probability: Scalar, rescale: str, key: MaskKey, samples: int, divisor: Scalar | None = None
) -> Tensor:
    """d with each element kept with its `probability` (a scalar or a tensor of d's shape), averaged over samples.

    `divisor`: what `rescale` inverse divides by, the probability where it is not given.
    """
    divisor = probability if divisor is None else divisor
    merged = _drop_once(d, probability, rescale, key, 0, divisor)
    for sample in range(1, samples):
        merged = merged + _drop_once(d, probability, rescale, key, sample, divisor)
    return merged / samples


def _drop_once(d: Tensor, probability: Scalar, rescale: str, key: MaskKey, sample: int, divisor: Scalar) -> Tensor:
    mask = uniform(key, d.shape, sample=sample, device=d.device) < probability
    kept = torch.where(mask, d, torch.zeros_like(d))
    if rescale == "l1":
        return match_l1(kept, d)
    return kept / divisor if rescale == "inverse" else kept


def elect(weighted: Sequence[Tensor]) -> Tensor:
    """Where the sum over models is not negative (bool): the sign that most of the mass has (TIES)."""
    return weighted_sum(weighted, [1.0] * len(weighted)) >= 0


def disjoint(weighted: Sequence[Tensor], weights: Sequence[Scalar], positive: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of what agrees with the elected sign, and the sum of the weights that took part (zeros do not)."""
    merged, divisor = torch.zeros_like(weighted[0]), torch.zeros_like(weighted[0])
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, vector > 0, vector < 0)
        merged = merged + torch.where(agrees, vector, torch.zeros_like(vector))
        divisor = divisor + agrees.to(vector.dtype) * weight
    return merged, divisor


def merge_linear(base: Tensor, kept: Sequence[Tensor], weight: Scalars, lam: Scalar, normalize: bool) -> Tensor:
    """base + lambda sum_i w_i d_i, divided by sum_i w_i if `normalize` (a sum below 1e-8 counts as 1)."""
    weights = per_model(weight, kept)
    merged = weighted_sum(kept, weights)
    if normalize:
        merged = merged / nonzero(total(weights), 1e-8)
    return base + merged * lam


def merge_elected(base: Tensor, kept: Sequence[Tensor], weight: Scalars, lam: Scalar, normalize: bool) -> Tensor:
    """base + lambda times the sum (the mean, if `normalize`) of those w_i d_i that have the elected sign."""
    weights = per_model(weight, kept)
    weighted = [d * w for d, w in zip(kept, weights, strict=True)]
    merged, divisor = disjoint(weighted, weights, elect(weighted))
    if normalize:
        merged = merged / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return base + merged * lam


@method(paper="Ilharco et al. 2022, arXiv:2212.04089", family="task_vector", base="required")
def task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """Add the weighted sum of the task vectors to the base.

    base + lambda sum_i w_i (x_i - base). A negative weight takes a skill away (task negation). Ilharco et al.,
    "Editing Models with Task Arithmetic", arXiv:2212.04089.

    weight: any number for each model, 1. lambda: any number, 1. normalize: divide by sum_i w_i, false.
    base and each model: one shape; returns that shape.
    """
    return merge_linear(base, task_vectors(base, models), weight, lam, normalize)


@method(paper="Yadav et al. 2023, arXiv:2306.01708", family="task_vector", base="required")
def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: TrimRescale = "none",
) -> Tensor:
    """Trim each task vector, elect a sign for each element, average what agrees with it.

    Keeps the k = max(1, floor(density n)) largest magnitudes of d_i (all that equal the k-th), D_i = w_i d_i, sign +1
    where sum_i D_i >= 0 and -1 elsewhere; base + lambda sum D_i / sum w_i over the models with that sign. Yadav et al.,
    "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708, algorithm 1.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. lambda: any number, 1. normalize: divide
    by the weights that took part, true. rescale: "none" or "l1" (scale the trimmed vector to its first L1 norm), none.
    base and each model: one shape; returns that shape.
    """
    return merge_elected(base, _trimmed(base, models, density, rescale), weight, lam, normalize)


def _trimmed(base: Tensor, models: Sequence[Tensor], density: Scalars, rescale: str) -> list[Tensor]:
    vectors = task_vectors(base, models)
    kept = [trim(d, p) for d, p in zip(vectors, per_model(density, models), strict=True)]
    return [match_l1(k, d) for k, d in zip(kept, vectors, strict=True)] if rescale == "l1" else kept


@method(paper="Yu et al. 2023, arXiv:2311.03099", family="task_vector", base="required")
def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: DropRescale = "inverse",
    samples: Samples = 1,
    q: Divisor = 0.0,
) -> Tensor:
    """Drop elements of each task vector at random, rescale the others, add the weighted sum to the base.

    m_ij ~ Bernoulli(density), d_i <- m_i d_i / density; base + lambda sum_i w_i d_i. Yu et al., "Language Models are
    Super Mario", arXiv:2311.03099. With q: / q in the place of / density (DAREx-q), Deng et al., arXiv:2410.09344.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. lambda: any number, 1. normalize: divide
    by sum_i w_i, false. rescale: "inverse" (by 1/density), "l1" or "none", inverse. samples: masks to average, 1.
    q: [0, 1], 0 (density). keys: one mask key for each model. base and each model: one shape; returns that shape.
    """
    return merge_linear(base, _dropped(base, models, keys, density, rescale, samples, q), weight, lam, normalize)


@method(paper="Yu et al. 2023, arXiv:2311.03099", family="task_vector", base="required")
def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: DropRescale = "inverse",
    samples: Samples = 1,
    q: Divisor = 0.0,
) -> Tensor:
    """Drop elements of each task vector at random and rescale the others, elect signs, sum what agrees.

    As `dare_linear`, with the election of `ties` before the sum. Yu et al., arXiv:2311.03099; Yadav et
    al., arXiv:2306.01708.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. lambda: any number, 1. normalize: divide
    by the weights that took part, false. rescale: "inverse" (by 1/density), "l1" or "none", inverse. samples: masks to
    average, 1. q: as `dare_linear`, 0. keys: one mask key for each model. base and each model: one shape; returns that
    shape.
    """
    return merge_elected(base, _dropped(base, models, keys, density, rescale, samples, q), weight, lam, normalize)


def _dropped(
    base: Tensor,
    models: Sequence[Tensor],
    keys: Sequence[MaskKey],
    density: Scalars,
    rescale: str,
    samples: int,
    q: Scalar,
) -> list[Tensor]:
    own = scalar(q)
    triples = zip(task_vectors(base, models), per_model(density, models), keys, strict=True)
    return [drop(d, p, rescale, key, samples, torch.where(own > 0, own, scalar(p))) for d, p, key in triples]
