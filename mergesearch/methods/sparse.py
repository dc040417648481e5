"""Task-vector methods that differ in what they make sparse: Model Breadcrumbs and DELLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Normalize, Scalar, Scalars, Weights, per_model, scalar
from mergesearch.methods.listening import statistic
from mergesearch.methods.masks import MaskKey
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import (
    Densities,
    DropRescale,
    Lambda,
    Samples,
    TrimRescale,
    drop,
    keep_count,
    magnitude_threshold,
    match_l1,
    merge_elected,
    merge_linear,
    task_vectors,
)

Gammas = Annotated[
    Scalars,
    Parameter(
        per_model=True,
        low=0.0,
        high=1.0,
        high_open=True,
        meaning="the fraction of largest magnitudes that is dropped as outliers",
    ),
]
Epsilons = Annotated[
    Scalars,
    Parameter(
        per_model=True,
        low=0.0,
        high=1.0,
        meaning="the half-width of the range of probabilities around density; cut where it would leave (0, 1]",
    ),
]


def outlier_count(n: int, density: Scalar, gamma: Scalar) -> int:
    """How many of the largest magnitudes breadcrumbs drops: floor(gamma n), fewer where density keeps more."""
    return min(int(float(gamma) * n), n - keep_count(n, density))


def trim_both(d: Tensor, density: Scalar, gamma: Scalar) -> Tensor:
    """d without its largest and its smallest magnitudes; elements equal to the last one kept, on either side, stay."""
    outliers, kept = outlier_count(d.numel(), density, gamma), keep_count(d.numel(), density)
    if kept == d.numel():
        return d
    high, low = magnitude_threshold(d, outliers + 1), magnitude_threshold(d, outliers + kept)
    size = d.abs()
    return torch.where((size >= low) & (size <= high), d, torch.zeros_like(d))


def magnitude_ranks(d: Tensor) -> Tensor:
    """The rank of each magnitude within its row (the last dimension), from 0 to 1, float32; equal ones share the mean.

    The element of a row of one has rank 1/2.
    """
    if d.shape[-1] == 1:
        return torch.full_like(d, 0.5, dtype=torch.float32)
    return rank_sums(d).to(torch.float32) / scalar(2 * (d.shape[-1] - 1))


@statistic(how="rows", per_element=True)
def rank_sums(d: Tensor) -> Tensor:
    """The first plus the last rank, from 0, among the equal magnitudes of the row; int16 where that holds it."""
    size = d.abs().contiguous()
    ordered = size.sort(dim=-1).values
    below, upto = (torch.searchsorted(ordered, size, right=right) for right in (False, True))
    return (below + upto - 1).to(torch.int16 if 2 * d.shape[-1] < 2**15 else torch.int32)


def keep_probabilities(ranks: Tensor, density: Scalar, epsilon: Scalar) -> Tensor:
    """density - epsilon + 2 epsilon rank, with epsilon cut so that all of them stay in (0, 1]; their mean is density.

    The cut leaves the least likely element a hundredth of density: with none at all its loss could not be made good.
    """
    density = scalar(density)
    epsilon = torch.minimum(scalar(epsilon), torch.minimum(1 - density, 0.99 * density))
    return (density - epsilon) + ranks * (2 * epsilon)


@method(paper="Davari and Belilovsky 2023, arXiv:2312.06795", family="task_vector", base="required")
def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    density: Densities = 1.0,
    gamma: Gammas = 0.01,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: TrimRescale = "none",
) -> Tensor:
    """Drop the largest and the smallest elements of each task vector, add the weighted sum of the rest to the base.

    Of d_i the floor(gamma n) largest magnitudes go (fewer where density + gamma > 1), then the smallest until
    k = max(1, floor(density n)) are left; base + lambda sum_i w_i d_i. Davari and Belilovsky, "Model Breadcrumbs",
    arXiv:2312.06795.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. gamma: [0, 1) for each model, 0.01. lambda:
    any number, 1. normalize: divide by sum_i w_i, false. rescale: "none" or "l1", none. base and each model: one shape;
    returns that shape.
    """
    return merge_linear(base, _crumbs(base, models, density, gamma, rescale), weight, lam, normalize)


@method(paper="Davari and Belilovsky 2023, arXiv:2312.06795", family="task_vector", base="required")
def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    density: Densities = 1.0,
    gamma: Gammas = 0.01,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: TrimRescale = "none",
) -> Tensor:
    """Drop the largest and the smallest elements of each task vector, elect signs, sum what agrees.

    As `breadcrumbs`, with the election of `ties` before the sum. Davari and Belilovsky, arXiv:2312.06795; Yadav et al.,
    arXiv:2306.01708.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. gamma: [0, 1) for each model, 0.01. lambda:
    any number, 1. normalize: divide by the weights that took part, false. rescale: "none" or "l1", none. base and each
    model: one shape; returns that shape.
    """
    return merge_elected(base, _crumbs(base, models, density, gamma, rescale), weight, lam, normalize)


def _crumbs(base: Tensor, models: Sequence[Tensor], density: Scalars, gamma: Scalars, rescale: str) -> list[Tensor]:
    vectors = task_vectors(base, models)
    triples = zip(vectors, per_model(density, models), per_model(gamma, models), strict=True)
    kept = [trim_both(d, p, g) for d, p, g in triples]
    return [match_l1(k, d) for k, d in zip(kept, vectors, strict=True)] if rescale == "l1" else kept


@method(paper="Deep et al. 2024, arXiv:2406.11617", family="task_vector", base="required")
def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    epsilon: Epsilons = 0.15,
    lam: Lambda = 1.0,
    normalize: Normalize = True,
    rescale: DropRescale = "inverse",
    samples: Samples = 1,
) -> Tensor:
    """Drop elements of each task vector at random, small ones sooner; rescale, elect signs, average what agrees.

    p_ij = density - epsilon + 2 epsilon r_ij, r the rank of |d_ij| within its row from 0 (smallest) to 1, equal ones
    sharing their mean rank; m_ij ~ Bernoulli(p_ij), d_ij <- m_ij d_ij / p_ij; then as `ties`. epsilon is cut to
    min(epsilon, 1 - density, 0.99 density), so the mean of p is always density. Deep et al., "DELLA-Merging: Reducing
    Interference in Model Merging through Magnitude-Based Sampling", arXiv:2406.11617.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. epsilon: [0, 1] for each model, 0.15.
    lambda: any number, 1. normalize: divide by the weights that took part, true. rescale: "inverse" (by 1/p), "l1" or
    "none", inverse. samples: masks to average, 1. keys: one mask key for each model. base and each model: one shape,
    a row is its last dimension; returns that shape.
    """
    return merge_elected(base, _della(base, models, keys, density, epsilon, rescale, samples), weight, lam, normalize)


@method(paper="Deep et al. 2024, arXiv:2406.11617", family="task_vector", base="required")
def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    epsilon: Epsilons = 0.15,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    rescale: DropRescale = "inverse",
    samples: Samples = 1,
) -> Tensor:
    """Drop elements of each task vector at random, small ones sooner; rescale, add the weighted sum to the base.

    As `della` without the election: base + lambda sum_i w_i d_i. Deep et al., arXiv:2406.11617.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. epsilon: [0, 1] for each model, 0.15.
    lambda: any number, 1. normalize: divide by sum_i w_i, false. rescale: "inverse" (by 1/p), "l1" or "none", inverse.
    samples: masks to average, 1. keys: one mask key for each model. base and each model: one shape, a row is its last
    dimension; returns that shape.
    """
    return merge_linear(base, _della(base, models, keys, density, epsilon, rescale, samples), weight, lam, normalize)


def _della(
    base: Tensor,
    models: Sequence[Tensor],
    keys: Sequence[MaskKey],
    density: Scalars,
    epsilon: Scalars,
    rescale: str,
    samples: int,
) -> list[Tensor]:
    rows = zip(task_vectors(base, models), per_model(density, models), per_model(epsilon, models), keys, strict=True)
    return [drop(d, keep_probabilities(magnitude_ranks(d), p, e), rescale, key, samples) for d, p, e, key in rows]
