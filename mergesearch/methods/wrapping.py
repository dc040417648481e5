"""What is done to the result of any method: a scale by depth (LiNeS), singular values calibrated (SVC).

A recipe names a wrapper after the method: `ties+lines`, `task_arithmetic+svc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalar, added, scalar
from mergesearch.methods.matrices import Embeddings, Triples, change, is_matrix, put_back, triples
from mergesearch.methods.registry import Parameter, wrapper
from mergesearch.methods.task_vector import l1_factor, l1_norm, task_vectors

Shallow = Annotated[
    Scalar,
    Parameter(low=0.0, meaning="the scale in the first layer and outside of the layers; 0: from the task vectors"),
]
Deep = Annotated[Scalar, Parameter(search=(0.5, 1.5), meaning="the scale in the last layer")]
Depth = Annotated[
    Scalar,
    Parameter(
        low=-1.0,
        high=1.0,
        meaning="how deep the tensor lies, from 0 in the first layer to 1 in the last; -1: where it does lie",
    ),
]
Floor = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        low_open=True,
        search=(0.05, 1.0),
        meaning="no direction counts as less than this share of a model's own",
    ),
]


@wrapper(paper="Wang et al. 2024, arXiv:2410.17146")
def lines(
    base: Tensor,
    models: Sequence[Tensor],
    merged: Tensor,
    *,
    shallow: Shallow = 0.0,
    deep: Deep = 1.0,
    depth: Depth = -1.0,
) -> Tensor:
    """Scale what the merge changes by depth: little in the first layers, which generalise, more in the last.

    D = merged - base; base + (a + (b - a) t) D, t the depth of the tensor's layer from 0 to 1 (0 outside of the
    layers), b = deep, a = shallow, or where that is 0: |mean_i d_i|_1 / |D|_1, which gives the first layer the length
    of the plain average. The paper takes that ratio over the whole model. Wang et al., "LiNeS: Post-training Layer
    Scaling Prevents Forgetting and Enhances Model Merging", arXiv:2410.17146.

    shallow: [0, inf), 0 (from the task vectors). deep: any number, 1. depth: [-1, 1], -1 (where the tensor lies). base,
    each model and merged: one shape; returns that shape.
    """
    change_ = merged - base
    mean = added(task_vectors(base, models)) / len(models)
    own = l1_factor(l1_norm(change_), l1_norm(mean))
    a = torch.where(scalar(shallow) > 0, scalar(shallow), own.cpu())
    return base + change_ * (a + (scalar(deep) - a) * scalar(depth).clamp(min=0.0))


@wrapper(paper="SVC 2026, arXiv:2602.05536", matrices=True)
def svc(
    base: Tensor,
    models: Sequence[Tensor],
    merged: Tensor,
    *,
    floor: Floor = 0.1,
    embeddings: Embeddings = False,
) -> Tensor:
    """Scale each singular direction of the merge down by how often the models count it.

    D = merged - base = U S V^T; for direction r and model i: a_i = u_r^T d_i, s_i = <u_r^T D, a_i> / |a_i|^2 (0 where
    a_i is 0); S_r <- S_r T / sum_i max(floor, s_i). What is no matrix stays as it is. Decomposes each new merge. "When
    Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging" (singular value calibration), arXiv:2602.05536.

    floor: (0, inf), 0.1. embeddings: calibrate them too, false. base, each model and merged: one shape; returns that
    shape.
    """
    if not is_matrix(base):
        return merged
    u, s, v = decomposed(base, merged)
    counted = torch.zeros_like(s)
    for model in models:
        own = u.T @ (model.double() - base.double())
        square = (own * own).sum(1)
        share = ((own * v).sum(1) * s) / torch.where(square > 0, square, 1.0)
        counted = counted + torch.where(square > 0, share, 0.0).clamp(min=float(floor))
    return put_back(merged, (u * (s * (len(models) / counted - 1))) @ v)


def decomposed(base: Tensor, merged: Tensor) -> Triples:
    """The singular triples of merged - base, float64 on the base's device."""
    u, s, v = triples(change(base, merged))
    return u.to(base.device), s.to(base.device), v.to(base.device)
