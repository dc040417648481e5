"""Methods that treat tensors as directions with a length and stay near the sphere between them.

Each is a linear combination of its inputs: the coefficients follow from the inputs' dot products (`common.gram`, the
statistic), and what is left is a weighted sum. Zero tensors stand at a right angle to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import (
    Normalize,
    Scalar,
    Weights,
    cosine,
    gram,
    nonzero,
    norms,
    per_model,
    rows_gram,
    scalar,
    total,
    weighted_sum,
)
from mergesearch.methods.listening import statistic
from mergesearch.methods.registry import Parameter, method

Position = Annotated[
    Scalar,
    Parameter(low=0.0, high=1.0, search=(0.0, 1.0), meaning="how far to go: 0 is the first model, 1 the second"),
]
Flatten = Annotated[bool, Parameter(kind="bool", meaning="one angle for the whole tensor, not one for each vector")]
RowWise = Annotated[
    bool, Parameter(kind="bool", meaning="without flatten: vectors run along the first dimension, not the last")
]
Eps = Annotated[float, Parameter(low=0.0, high=1.0, meaning="added to each norm before dividing by it")]
Steps = Annotated[int, Parameter(kind="int", low=1, high=10000, meaning="the most steps of the iteration")]
Tolerance = Annotated[float, Parameter(low=0.0, meaning="stop when the step, an angle in radians, is below this")]


@method(
    paper="Shoemake 1985, SIGGRAPH 19(3), 245-254", family="interpolation", base="unused", min_models=2, max_models=2
)
def slerp(base: Tensor | None, models: Sequence[Tensor], *, t: Position = 0.5) -> Tensor:
    """Go from the first model to the second along the great circle between their directions.

    sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, theta the angle between a and b as flat vectors; the line
    (1-t) a + t b where |cos theta| > 0.9995. Shoemake, "Animating rotation with quaternion curves", 1985.

    t: [0, 1], 0.5. Two models of one shape; returns that shape.
    """
    return weighted_sum(models, slerp_coefficients(cosine(gram(models), 0, 1), scalar(t), straight=0.9995))


@method(
    paper="Goddard et al. 2024 (mergekit), arXiv:2403.13257",
    family="interpolation",
    base="optional",
    min_models=2,
    max_models=2,
)
def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    flatten: Flatten = True,
    row_wise: RowWise = False,
) -> Tensor:
    """Slerp by relative weights, of the models or, where there is a base, of their task vectors.

    `slerp` with t = w_2 / (w_1 + w_2) (1/2 where the sum is below 1e-8) between x_1 and x_2, or base plus that between
    x_1 - base and x_2 - base; the line where the vectors are parallel (|cos theta| > 1 - 1e-8). Without `flatten` each
    vector along the last dimension has an angle of its own, with `row_wise` each along the first. Goddard et al.,
    "Arcee's MergeKit", arXiv:2403.13257, whose implementation defines the method.

    weight: any number for each model, 1. flatten: true. row_wise: false. Two models, and a base or none, of one shape;
    returns that shape.
    """
    vectors = models if base is None else [model - base for model in models]
    products = gram(vectors) if flatten else rows_gram(vectors, 0 if row_wise else -1)
    left, right = slerp_coefficients(cosine(products, 0, 1), share(per_model(weight, models)), straight=1 - 1e-8)
    # coefficients with a dimension would promote float32 to float64, so they are rounded first
    dtype = vectors[0].dtype
    merged = weighted_sum(vectors, [left.to(dtype), right.to(dtype)])
    return merged if base is None else base + merged


@method(paper="Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea", family="interpolation", base="optional")
def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    normalize: Normalize = True,
    eps: Eps = 1e-8,
) -> Tensor:
    """The weighted mean of directions, with the weighted mean of lengths, of any number of models.

    u_i = d_i / (|d_i| + eps), m = sum_i w_i u_i, the result is m/|m| sum_i w_i |d_i|, where d_i is the model or, where
    there is a base, its task vector; `normalize` divides the weights by their sum first. (The published step in the
    tangent space at m is always zero: the tangent vectors there sum to m - m.) Opposite directions that cancel give
    zero. Goddard, "Multi-SLERP: wow, what a cool idea", goddard.blog.

    weight: any number for each model, 1. normalize: true. eps: [0, 1], 1e-8. Models, and a base or none, of one shape;
    returns that shape.
    """
    vectors = models if base is None else [model - base for model in models]
    weights = torch.stack([scalar(w) for w in per_model(weight, models)])
    weights = weights / nonzero(weights.sum(), 1e-8) if normalize else weights
    merged = weighted_sum(vectors, mean_direction(gram(vectors), weights, eps).unbind())
    return merged if base is None else base + merged


@method(
    paper="Karcher 1977, Comm. Pure Appl. Math. 30(5); Wang et al. 2026, arXiv:2603.04972",
    family="interpolation",
    base="unused",
)
def karcher(base: Tensor | None, models: Sequence[Tensor], *, max_iter: Steps = 10, tol: Tolerance = 1e-5) -> Tensor:
    """The Karcher mean of the models' directions, with the mean of their lengths.

    The point m on the unit sphere with the least sum of squared angles to u_i = x_i/|x_i|: from the mean direction,
    m <- exp_m(mean_i log_m(u_i)) until the step is below `tol`; the result is m times the mean of |x_i| (zero models
    have a length but no direction). Karcher, "Riemannian center of mass and mollifier smoothing", 1977; for language
    models Wang et al., "Functionality-oriented LLM merging on the Fisher-Rao manifold", arXiv:2603.04972.

    max_iter: [1, 10000], 10. tol: [0, inf), 1e-5. Each model: one shape; returns that shape.
    """
    return weighted_sum(models, karcher_coefficients(gram(models), max_iter, tol).unbind())


def slerp_coefficients(cos: Tensor, t: Tensor, straight: float) -> tuple[Tensor, Tensor]:
    """What the two ends are multiplied by; those of the line where |cos| > `straight`. Shapes broadcast."""
    line = cos.abs() > straight
    theta = torch.acos(torch.where(line, 0.0, cos))
    t = t.to(cos.device)
    left, right = torch.sin((1 - t) * theta) / torch.sin(theta), torch.sin(t * theta) / torch.sin(theta)
    return torch.where(line, 1 - t, left), torch.where(line, t, right)


def share(weights: Sequence[Scalar]) -> Tensor:
    """w_2 / (w_1 + w_2), 1/2 where the sum is below 1e-8 in magnitude."""
    sums = total(weights)
    empty = sums.abs() < 1e-8
    return torch.where(empty, 0.5, scalar(weights[1]) / torch.where(empty, 1.0, sums))


def mean_direction(products: Tensor, weights: Tensor, eps: float) -> Tensor:
    """The (N,) coefficients of `multislerp` from the (N, N) dot products."""
    lengths, weights = norms(products), weights.to(products.device)
    towards = torch.where(lengths > 0, weights / (lengths + eps + (lengths == 0)), 0.0)
    length = _length(towards, products)
    gone = length < 1e-8
    return torch.where(gone, 0.0, towards / torch.where(gone, 1.0, length)) * (weights * lengths).sum()


@statistic()
def karcher_coefficients(products: Tensor, max_iter: int, tol: float) -> Tensor:
    """The (N,) coefficients of `karcher` from the (N, N) dot products."""
    lengths = norms(products)
    there = (lengths > 0).double()
    scale = 1 / torch.where(lengths > 0, lengths, 1.0)
    units = products * scale[:, None] * scale[None, :]
    shares = there / there.sum().clamp(min=1)
    mean = _start(units, shares)
    for _ in range(max_iter):
        step = _tangent(units, shares, mean)
        angle = _length(step, units)
        if angle < tol or angle == 0:
            break
        mean = mean * torch.cos(angle) + step * (torch.sin(angle) / angle)
        mean = mean / _length(mean, units)
    return mean * scale * lengths.mean()


def _start(units: Tensor, shares: Tensor) -> Tensor:
    length = _length(shares, units)
    if length > 1e-8:
        return shares / length
    # directions that cancel have no mean: begin at the first one
    return torch.zeros_like(shares).index_fill(0, (shares > 0).int().argmax(), 1.0) * (shares > 0)


def _tangent(units: Tensor, shares: Tensor, mean: Tensor) -> Tensor:
    cos = (units @ mean).clamp(-1.0, 1.0)
    theta = torch.acos(cos)
    # theta/sin(theta) is 1 near the point itself; opposite it there is no shortest way, so it pulls nowhere
    away = torch.where(theta < 1e-6, 1.0, theta / torch.sin(theta).clamp(min=1e-6))
    away = torch.where(cos < -1 + 1e-12, 0.0, away)
    pull = shares * away
    return pull - (pull * cos).sum() * mean


def _length(coefficients: Tensor, products: Tensor) -> Tensor:
    return (coefficients @ products @ coefficients).clamp(min=0).sqrt()
