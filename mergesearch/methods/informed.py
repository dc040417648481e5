"""RegMean and Fisher averaging with every matrix and element: what documents say of each model is given beside it.

What is given is a statistic of the model on documents of its own tasks, one tensor for each model: `search.soup.full`
measures it, and a recipe names it by its documents and its hash. Each counts relative to the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalar, added
from mergesearch.methods.matrices import Embeddings, averaged, change, is_matrix, numbers, put_back, times_inverse
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.regression import Counts, add_ridge
from mergesearch.methods.task_vector import Lambda, task_vectors

Shrink = Annotated[
    Scalar,
    Parameter(low=0.0, high=1.0, search=(0.1, 1.0), meaning="what the Gram matrices count off their diagonals"),
]


@method(paper="Jin et al. 2023, arXiv:2212.09849", family="task_vector", base="required", matrices=True, data="inputs")
def regmean(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    statistics: Sequence[Tensor | None],
    weight: Counts = 1.0,
    alpha: Shrink = 0.9,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """The matrix whose outputs are nearest to each model's own on that model's inputs.

    G_i = X_i^T X_i of a linear layer's inputs in model i, alpha times off its diagonal, D = (sum_i w_i d_i G_i)
    (sum_i w_i G_i + r I)^(-1), r = 1e-6 times the mean diagonal of the sum; base + lambda D. What is no matrix, or has
    no statistics, is averaged. Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", section
    3, arXiv:2212.09849; with inputs of the merged model's layers Nguyen et al., "RegMean++", arXiv:2508.03121.

    weight: [0, inf) for each model, 1. alpha: [0, 1], 0.9. lambda: any number, 1. embeddings: solve them too, false.
    statistics: G_i, (in, in) for tensors (out, in), (1, in, in) for tensors (in, out) as GPT-2's; None where there is
    none. base and each model: one shape; returns that shape.
    """
    grams = [s for s in statistics if s is not None]
    if not is_matrix(base) or len(grams) < len(models):
        return averaged(base, models, weight, lam)
    turned = grams[0].ndim == 3
    left: list[Tensor] = []
    right: list[Tensor] = []
    for model, gram, w in zip(models, grams, numbers(weight, models), strict=True):
        g = _shrunk(gram[0] if turned else gram, float(alpha)) * w
        d = change(base, model)
        left.append((d.T if turned else d) @ g)
        right.append(g)
    gram = added(right)
    add_ridge(gram, gram.diagonal().mean())
    solved = times_inverse(added(left), gram)
    return put_back(base, (solved.T if turned else solved) * float(lam))


def _shrunk(gram: Tensor, alpha: float) -> Tensor:
    """The Gram matrix in float64 on the CPU, alpha times off its diagonal."""
    wide = gram.double().cpu()
    return wide * alpha + torch.diag(wide.diagonal() * (1 - alpha))


@method(paper="Matena and Raffel 2022, arXiv:2111.09832", family="task_vector", base="required", data="squares")
def fisher(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    statistics: Sequence[Tensor | None],
    weight: Counts = 1.0,
    lam: Lambda = 1.0,
) -> Tensor:
    """The mean of the models, each element weighed by how much that model's loss depends on it.

    D = sum_i w_i F_i d_i / sum_i w_i F_i, element by element, F_i the diagonal of model i's Fisher information; base +
    lambda D. Where no F_i counts it is the plain average. Matena and Raffel, "Merging Models with Fisher-Weighted
    Averaging", equation 2, arXiv:2111.09832.

    weight: [0, inf) for each model, 1. lambda: any number, 1. statistics: F_i, of the models' shape, not negative;
    None where there is none. base and each model: one shape; returns that shape.
    """
    vectors = task_vectors(base, models)
    if any(s is None for s in statistics):
        return averaged(base, models, weight, lam)
    shares = [
        s.to(base.device).double() * w
        for s, w in zip(statistics, numbers(weight, models), strict=True)
        if s is not None
    ]
    total = added(shares)
    there = total > 0
    mixed = added(d.double() * (s / torch.where(there, total, 1.0)) for d, s in zip(vectors, shares, strict=True))
    plain = added(d.double() for d in vectors) / len(vectors)
    return put_back(base, torch.where(there, mixed, plain) * float(lam))
