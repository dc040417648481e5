"""Consensus merging: only what several models want is kept of the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalar, Weights, added, per_model, weighted_sum
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import Lambda, task_vectors

Wanting = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        search=(0.2, 0.6),
        meaning="a model wants an element where its own change exceeds so many times what the others add to it",
    ),
]
Votes = Annotated[
    int, Parameter(kind="int", low=1, meaning="how many models must want an element; all, if there are fewer")
]


@method(paper="Wang et al. 2024, arXiv:2405.07813", family="task_vector", base="required")
def consensus(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    l: Wanting = 0.4,  # noqa: E741  # the paper's lambda, which is another thing here
    k: Votes = 2,
    lam: Lambda = 1.0,
) -> Tensor:
    """Add up the task vectors, and keep of the sum the elements that at least k models want.

    m_i = |d_i| > l |sum_j d_j - d_i|; base + lambda sum_i w_i d_i where min(k, T) or more of the m_i are true, base
    elsewhere. Wang et al., "Localizing Task Information for Improved Model Merging and Compression" (Consensus Task
    Arithmetic with TALL masks), arXiv:2405.07813.

    weight: any number for each model, 1. l: [0, inf), 0.4. k: [1, inf), 2. lambda: any number, 1. base and each model:
    one shape; returns that shape.
    """
    vectors = task_vectors(base, models)
    whole = added(vectors)
    wanted = added((d.abs() > (whole - d).abs() * l).to(torch.int32) for d in vectors)
    merged = weighted_sum(vectors, per_model(weight, models))
    return base + torch.where(wanted >= min(k, len(models)), merged, torch.zeros_like(merged)) * lam
