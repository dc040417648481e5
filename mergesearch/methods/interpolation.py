"""Averages and selections of the models themselves; spherical paths between them are in sphere.py.

All tensors of one call have one shape, dtype (float32 or float64) and device; scalars may be 0-d float64 tensors.
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
    added,
    cosine,
    gram,
    nonzero,
    per_model,
    rows_gram,
    scalar,
    total,
    weighted_sum,
)
from mergesearch.methods.listening import kth_smallest, statistic
from mergesearch.methods.registry import Parameter, method

Nearness = Annotated[
    Scalar,
    Parameter(low=0.0, search=(0.0, 0.01), meaning="elements nearer than this are taken from the second model whole"),
]
FilterWise = Annotated[
    bool, Parameter(kind="bool", meaning="one ratio for each vector along the last dimension, not for the tensor")
]


@method(paper="Wortsman et al. 2022, arXiv:2203.05482", family="interpolation", base="unused")
def linear(
    base: Tensor | None, models: Sequence[Tensor], *, weight: Weights = 1.0, normalize: Normalize = True
) -> Tensor:
    """Average the models, weighted.

    sum_i w_i x_i, divided by sum_i w_i if `normalize` (a sum below 1e-8 counts as 1). Wortsman et al., "Model soups",
    arXiv:2203.05482.

    weight: any number for each model, 1. normalize: true. Each model: one shape; returns that shape.
    """
    weights = per_model(weight, models)
    merged = weighted_sum(models, weights)
    return merged / nonzero(total(weights), 1e-8) if normalize else merged


@method(paper="Wortsman et al. 2022, arXiv:2203.05482", family="interpolation", base="unused")
def uniform_soup(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Average the models with equal weights: `linear` with nothing to choose.

    (1/N) sum_i x_i. Wortsman et al., "Model soups", arXiv:2203.05482, the uniform soup. Each model: one shape; returns
    that shape.
    """
    return linear(base, models)


@method(
    paper="alchemonaut 2024, model card of QuartetAnemoi-70B-t0.0001",
    family="interpolation",
    base="unused",
    min_models=2,
    max_models=2,
)
def nearswap(base: Tensor | None, models: Sequence[Tensor], *, t: Nearness = 0.001) -> Tensor:
    """Take the second model's elements where they are near the first's, and less of them the further they are.

    v = clamp(t / max(|a - b|, 1e-6), 0, 1); (1 - v) a + v b. alchemonaut, model card of
    QuartetAnemoi-70B-t0.0001, 2024.

    t: [0, inf), 0.001, in the units of the weights. Two models of one shape; returns that shape.
    """
    first, second = models
    near = (scalar(t).to(first.dtype) / (first - second).abs().clamp(min=1e-6)).clamp(0.0, 1.0)
    return second * near + first * (1 - near)


@method(paper="Jang et al. 2024, arXiv:2403.19522", family="interpolation", base="required", min_models=2)
def model_stock(base: Tensor, models: Sequence[Tensor], *, filter_wise: FilterWise = False) -> Tensor:
    """Go from the base towards the average of the models as far as their agreement warrants.

    t = N c / (1 + (N - 1) c), c the mean over all pairs of <d_i, d_j> / max(|d_i| |d_j|, 1e-6), the cosine of the task
    vectors; t is 0 at the singularity (a divisor below 1e-6); t mean_i x_i + (1 - t) base. Jang et al., "Model Stock:
    All we need is just a few fine-tuned models", arXiv:2403.19522.

    filter_wise: one t for each vector along the last dimension, false. Base and two or more models of one shape;
    returns that shape.
    """
    vectors = [model - base for model in models]
    ratio = stock_ratio(rows_gram(vectors, -1) if filter_wise else gram(vectors))
    average = weighted_sum(models, [1.0] * len(models)) / len(models)
    ratio = ratio.to(base.dtype) if filter_wise else ratio
    return average * ratio + base * (1 - ratio)


def stock_ratio(products: Tensor) -> Tensor:
    """The interpolation ratio t of `model_stock` from the (N, N, ...) dot products of the task vectors."""
    n = len(products)
    pairs = [cosine(products, i, j, floor=1e-6) for i in range(n) for j in range(i)]
    c = added(pairs) / len(pairs)
    divisor = 1 + (n - 1) * c
    singular = divisor.abs() < 1e-6
    return torch.where(singular, 0.0, n * c / torch.where(singular, 1.0, divisor))


@method(
    paper="Arcee 2025, MergeKit v0.1 release notes", family="interpolation", base="unused", min_models=2, max_models=2
)
def arcee_fusion(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Take the second model's elements where they differ from the first's by far more than usual.

    importance_ij = |b_ij - a_ij| KL(softmax(b_i) || softmax(a_i)), the softmax over the last dimension; b where it is
    at least median + 1.5 (Q3 - Q1) of all importances, a elsewhere; the quartiles are the lower of two neighbours.
    Arcee, "Meet MergeKit v0.1: Arcee Fusion", 2025.

    Two models of one shape, the first is the one to keep; returns that shape.
    """
    first, second = models
    scores = importance(first, second)
    return torch.where(scores >= outlier_threshold(scores), second, first)


@statistic(how="rows", per_element=True)
def importance(first: Tensor, second: Tensor) -> Tensor:
    """|b - a| times the divergence of each vector along the last dimension, float64: near models diverge by little."""
    logs = [torch.log_softmax(x.double(), dim=-1) for x in (first, second)]
    divergence = (logs[1].exp() * (logs[1] - logs[0])).sum(-1, keepdim=True)
    return (second.double() - first.double()).abs() * divergence


def outlier_threshold(scores: Tensor) -> Tensor:
    """median + 1.5 (Q3 - Q1), each the order statistic at floor(q (n - 1)); 0-d."""
    lower, middle, upper = (kth_smallest(scores, 1 + int(q * (scores.numel() - 1))) for q in (0.25, 0.5, 0.75))
    return middle + 1.5 * (upper - lower)
