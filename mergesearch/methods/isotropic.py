"""Isotropic merging: the singular values of the summed task vector made more alike, Iso-C and Iso-CTS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalar, Weights, added
from mergesearch.methods.matrices import (
    Embeddings,
    Triples,
    averaged,
    change,
    extent,
    first,
    is_matrix,
    numbers,
    polar,
    side_by_side,
    spectral,
    triples,
)
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import Lambda

Softness = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        search=(0.0, 1.0),
        meaning="0: all singular values become their mean; 1: they stay as they are",
    ),
]
CommonShare = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        search=(0.4, 1.0),
        meaning="the share of directions that is taken from the sum, not from models",
    ),
]


@method(paper="Marczak et al. 2025, arXiv:2502.04959", family="task_vector", base="required", matrices=True)
def iso(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    a: Softness = 0.0,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """Add up the task vectors and make the sum's singular values more alike.

    D = sum_i w_i d_i = U S V^T; S' = mean(S)^(1 - a) S^a over the numerical rank, S_j > max(out, in) 2^-23 S_1, so that
    noise is not scaled up; base + lambda U diag(S') V^T: a = 0 is Iso-C, a = 1 task arithmetic. What is no matrix is
    averaged. Decomposes each new sum. Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and
    Task-Specific Subspaces", arXiv:2502.04959.

    weight: any number for each model, 1. a: [0, 1], 0. lambda: any number, 1. embeddings: decompose them too, false.
    base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    u, s, v = summed(base, models, tuple(numbers(weight, models)))
    if len(s):
        s = s.mean() ** (1 - float(a)) * s ** float(a)
    return spectral(base, u, s, v, lam)


def summed(base: Tensor, models: Sequence[Tensor], weights: tuple[float, ...]) -> Triples:
    """The singular triples of sum_i w_i d_i, float64 on the base's device."""
    u, s, v = triples(_sum(base, models, weights))
    return u.to(base.device), s.to(base.device), v.to(base.device)


def _sum(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return added(change(base, model) * w for model, w in zip(models, weights, strict=True))


@method(paper="Marczak et al. 2025, arXiv:2502.04959", family="task_vector", base="required", matrices=True)
def iso_cts(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    common: CommonShare = 0.8,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """As iso with a = 0, with directions of each model's own beside those of the sum.

    n = round((m - floor(common m)) / T), m = min(out, in); the first m - n T triples of D = sum_i w_i d_i; of each
    w_i d_i, less its part in the sum's kept left directions, the first n; side by side, both sides made orthonormal
    (polar), all singular values their mean. What is no matrix is averaged. Decomposes each new sum. Marczak et al.
    (Iso-CTS), arXiv:2502.04959.

    weight: any number for each model, 1. common: [0, 1], 0.8. lambda: any number, 1. embeddings: decompose them too,
    false. base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    u, s, v = common_and_own(base, models, tuple(numbers(weight, models)), float(common))
    return spectral(base, u, s, v, lam)


def common_and_own(base: Tensor, models: Sequence[Tensor], weights: tuple[float, ...], common: float) -> Triples:
    """The orthonormal sides and the mean singular value of Iso-CTS, float64 on the base's device."""
    side = min(extent(base))
    own = round((side - int(common * side + 1e-9)) / len(models))
    shared = side - own * len(models)
    leading = first(triples(_sum(base, models, weights)), shared)
    parts = [] if own else [leading]
    for model, w in zip(models, weights, strict=True) if own else ():
        d = change(base, model) * w
        parts.append(first(triples(d - leading[0] @ (leading[0].T @ d), d), own))
    u, s, v = side_by_side([*parts, leading] if own else parts)
    mean = s.mean() if len(s) else torch.zeros((), dtype=s.dtype)
    return tuple(t.to(base.device) for t in (polar(u), mean.expand(len(s)).clone(), polar(v)))  # type: ignore[return-value]
