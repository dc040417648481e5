"""Task-vector methods that take their coefficients from the task vectors themselves: SCE and RAM.

The references know no weight and no lambda; here a weight multiplies what the method computes itself, so the default
of 1 equals them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Normalize, Scalar, Scalars, Weights, added, dot, per_model, scalar
from mergesearch.methods.listening import count_nonzero, kth_smallest, statistic
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import Lambda, elect, task_vectors

TopShare = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        low_open=True,
        search=(0.1, 1.0),
        meaning="the share of elements, by variance over the models, that is merged",
    ),
]
Changed = Annotated[Scalar, Parameter(low=0.0, meaning="an element that moved by no more than this did not change")]
Rate = Annotated[Scalar, Parameter(low=0.0, search=(0.0, 1.0), meaning="how much unique changes are scaled up")]
Ceiling = Annotated[
    Scalar, Parameter(low=0.0, search=(0.0, 1.0), meaning="the most that the ratio of shared to unique counts for")
]


def spread(vectors: Sequence[Tensor]) -> Tensor:
    """The variance of each element over the models; exactly 0 where all are equal."""
    shifted = [d - vectors[0] for d in vectors]
    mean = added(shifted) / len(shifted)
    return added((d - mean) ** 2 for d in shifted) / len(shifted)


def spread_threshold(variance: Tensor, top: Scalar) -> Tensor:
    """The least variance among the max(1, floor(top n)) largest of the n that are not 0; 0 where all are 0."""
    keep = (count_nonzero(variance) * top).floor().clamp(min=1)
    return kth_smallest(variance, variance.numel() + 1 - keep)


def energy_shares(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Each task vector's share of the sum of squares, 0-d float64; equal shares where all are 0."""
    squares = torch.stack([dot(d, d) for d in vectors])
    whole = squares.sum()
    return list(torch.where(whole > 0, squares / whole, 1.0 / len(vectors)).unbind())


@method(paper="Wan et al. 2024 (FuseChat), arXiv:2408.07990", family="task_vector", base="required")
def sce(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    lam: Lambda = 1.0,
    select_topk: TopShare = 1.0,
    normalize: Normalize = True,
) -> Tensor:
    """Select the elements on which the models differ most, calculate coefficients, erase the minority's signs.

    Keep the k = max(1, floor(select_topk m)) elements of largest variance over the models, m of them not zero (all of
    them where nothing varies or select_topk is 1); c_i = w_i mean(d_i^2) / sum_j mean(d_j^2); sign +1 where
    sum_i w_i d_i >= 0, else -1; base + lambda sum c_i d_i / sum c_i over the models whose w_i d_i has that sign. Wan et
    al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990.

    weight: any number for each model, 1. lambda: any number, 1. select_topk: (0, 1], 1. normalize: divide by the
    coefficients that took part, true. base and each model: one shape; returns that shape.
    """
    vectors = _selected(task_vectors(base, models), select_topk)
    weights = per_model(weight, models)
    coefficients = [s * w for s, w in zip(energy_shares(vectors), weights, strict=True)]
    weighted = [d * w for d, w in zip(vectors, weights, strict=True)]
    merged, divisor = _agreeing(vectors, weighted, coefficients)
    if normalize:
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return base + merged * lam


def _selected(vectors: list[Tensor], top: Scalar) -> list[Tensor]:
    if float(top) >= 1:
        return vectors
    variance = spread(vectors)
    kept = variance >= spread_threshold(variance, top)
    return [torch.where(kept, d, torch.zeros_like(d)) for d in vectors]


def _agreeing(
    vectors: Sequence[Tensor], weighted: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    positive = elect(weighted)
    merged, divisor = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for d, vector, coefficient in zip(vectors, weighted, coefficients, strict=True):
        agrees = torch.where(positive, vector > 0, vector < 0)
        merged = merged + torch.where(agrees, d * coefficient, torch.zeros_like(d))
        divisor = divisor + agrees.to(d.dtype) * coefficient
    return merged, divisor


@method(paper="Yuan et al. 2026, arXiv:2601.13572", family="task_vector", base="required")
def ram(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    lam: Lambda = 1.0,
    epsilon: Changed = 1e-5,
) -> Tensor:
    """Average an element where several models changed it, keep it whole where one did.

    Model i changed element j where |d_ij| > epsilon, n_j models did; base + (lambda / max(n_j, 1)) times the sum of
    w_i d_ij over them. Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models" (Reinforced Agent Merging),
    arXiv:2601.13572.

    weight: any number for each model, 1. lambda: any number, 1. epsilon: [0, inf), 1e-5, in the units of the weights.
    base and each model: one shape; returns that shape.
    """
    return _merge_changes(base, models, weight, lam, epsilon, None)


@method(paper="Yuan et al. 2026, arXiv:2601.13572", family="task_vector", base="required")
def ramplus_tl(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    lam: Lambda = 1.0,
    epsilon: Changed = 1e-5,
    r: Rate = 0.1,
    alpha: Ceiling = 0.2,
) -> Tensor:
    """As ram, with what only one model changed scaled up where that model shares much with others.

    Unique changes of model i are multiplied by 1 + r min(alpha, shared_i / unique_i), the counts of elements of this
    tensor that it changed with others and alone ("tensor-local" RAM+). Yuan et al., arXiv:2601.13572.

    weight: any number for each model, 1. lambda: any number, 1. epsilon: [0, inf), 1e-5, in the units of the weights.
    r: [0, inf), 0.1. alpha: [0, inf), 0.2. base and each model: one shape; returns that shape.
    """
    return _merge_changes(base, models, weight, lam, epsilon, (r, alpha))


def unique_scale(changed: Tensor, count: Tensor, r: Scalar, alpha: Scalar) -> Tensor:
    """1 + r min(alpha, shared / unique) of one model, 0-d float64; `count`: how many models changed each element."""
    unique, shared = unique_and_shared(changed, count).unbind()
    ratio = shared / unique.clamp(min=1)
    return 1 + scalar(r).to(ratio.device) * torch.minimum(ratio, scalar(alpha).to(ratio.device))


@statistic(how="sum")
def unique_and_shared(changed: Tensor, count: Tensor) -> Tensor:
    """How many elements one model changed alone and how many with others, (2,) float64."""
    return torch.stack([(changed & (count == 1)).sum(), (changed & (count > 1)).sum()]).double()


def _merge_changes(
    base: Tensor,
    models: Sequence[Tensor],
    weight: Scalars,
    lam: Scalar,
    epsilon: Scalar,
    scaling: tuple[Scalar, Scalar] | None,
) -> Tensor:
    vectors = task_vectors(base, models)
    changed = [d.abs() > epsilon for d in vectors]
    count = added(c.to(torch.int32) for c in changed)
    merged = torch.zeros_like(base)
    for d, w, moved in zip(vectors, per_model(weight, models), changed, strict=True):
        whole = d * w
        alone = whole if scaling is None else whole * unique_scale(moved, count, *scaling)
        part = torch.where(count > 1, whole / count.clamp(min=1), alone)
        merged = merged + torch.where(moved, part, torch.zeros_like(part))
    return base + merged * lam
