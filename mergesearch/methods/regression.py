"""RegMean without data: the merge that each model's own task vector disturbs least, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalar, Scalars, added
from mergesearch.methods.listening import statistic
from mergesearch.methods.matrices import (
    Embeddings,
    averaged,
    change,
    extent,
    is_matrix,
    numbers,
    put_back,
    times_inverse,
    within_rank,
)
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import Lambda

# of the mean diagonal of the summed Gram matrices
_RIDGE = 1e-6

Counts = Annotated[
    Scalars,
    Parameter(per_model=True, low=0.0, search=(0.0, 1.0), meaning="how much each model's own directions count"),
]
LengthPower = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        search=(0.0, 1.0),
        meaning="the power of its squared length that a task vector is divided by: 0 ACTMat, 1 the optimum of WUDI",
    ),
]


@method(paper="Tam et al. 2026, arXiv:2604.01329", family="task_vector", base="required", matrices=True)
def regmean_free(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Counts = 1.0,
    p: LengthPower = 0.0,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """RegMean with each task vector's own Gram matrix in the place of its inputs': no data needed.

    G_i = w_i d_i^T d_i / |d_i|^(2p), D = (sum_i d_i G_i) (sum_i G_i + r I)^(-1), r = 1e-6 times the mean diagonal of
    the sum; base + lambda D. Where the models have fewer rows together than columns the same is solved in the space of
    rows. What is no matrix is averaged. p = 0: Tam et al., "ACTMat", arXiv:2604.01329; p = 1: the optimum of Cheng et
    al., "Whoever Started the Interference Should End It" (WUDI), arXiv:2503.08099.

    weight: [0, inf) for each model, 1. p: [0, 1], 0. lambda: any number, 1. embeddings: decompose them too, false.
    base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    rows = by_rows(base, models)
    squares, *kept = row_products(base, models) if rows else column_products(base, models)
    shares = _shares(squares, numbers(weight, models), float(p))
    solve = _solved_by_rows if rows else _solved_by_columns
    return put_back(base, solve(base, models, shares, *kept) * float(lam))


def by_rows(base: Tensor, models: Sequence[Tensor]) -> bool:
    """Whether all models' rows together are fewer than the columns: then their products are the smaller matrix."""
    return len(models) * base.shape[0] < base.shape[1]


def _shares(squares: Tensor, weights: Sequence[float], p: float) -> Tensor:
    """w_i / |d_i|^(2p), (T,) float64; 0 where d_i is 0."""
    scale = squares.double().clamp(min=torch.finfo(torch.float64).tiny) ** p
    given = torch.tensor(weights, dtype=torch.float64, device=squares.device)
    # relative to the largest, so that the solve does not depend on the units of the weights
    shares = torch.where(squares > 0, given / scale, torch.where(squares.isnan(), squares.double(), 0.0))
    return shares / torch.where(shares.max() > 0, shares.max(), 1.0)


@statistic(how="matrix")
def column_products(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """|d_i|^2 (T,), d_i^T d_i (T, in, in), d_i d_i^T d_i (T, out, in), each d_i within its numerical rank.

    Float64 whatever the tensors are: rounded to float32, their errors would be as large as the ridge.
    """
    changes = [within_rank(change(base, model)) for model in models]
    grams = [d.T @ d for d in changes]
    squares = torch.stack([g.diagonal().sum() for g in grams])
    products = torch.stack([d @ g for d, g in zip(changes, grams, strict=True)])
    return squares.to(base.device), torch.stack(grams).to(base.device), products.to(base.device)


def _solved_by_columns(
    base: Tensor, models: Sequence[Tensor], shares: Tensor, grams: Tensor, products: Tensor
) -> Tensor:
    gram = torch.tensordot(shares, grams, 1)
    add_ridge(gram, gram.diagonal().sum() / extent(base)[1])
    return times_inverse(torch.tensordot(shares, products, 1), gram)


@statistic(how="matrix")
def row_products(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """|d_i|^2 (T,), and the products of all rows of all d_i, (T out, T out); as `column_products`."""
    stacked = torch.cat([within_rank(change(base, model)) for model in models])
    products = stacked @ stacked.T
    squares = products.diagonal().reshape(len(models), -1).sum(1)
    return squares.to(base.device), products.to(base.device)


def _solved_by_rows(base: Tensor, models: Sequence[Tensor], shares: Tensor, products: Tensor) -> Tensor:
    """(sum_i d_i G_i) (sum_i G_i + r I)^(-1) = P (A A^T + r I)^(-1) A, A the weighted rows, P = [d_1 d_1^T w_1 ...]."""
    out, inner = base.shape[0], extent(base)[1]
    roots = shares.sqrt().repeat_interleave(out)
    kernel = products * roots[:, None] * roots
    add_ridge(kernel, kernel.diagonal().sum() / inner)
    own = [products[i * out : (i + 1) * out, i * out : (i + 1) * out] for i in range(len(models))]
    left = torch.cat([block * share.sqrt() for block, share in zip(own, shares, strict=True)], 1)
    solved = (times_inverse(left, kernel) * roots).split(out, 1)
    return added(part @ (model.double() - base.double()) for part, model in zip(solved, models, strict=True))


def add_ridge(gram: Tensor, mean: Tensor) -> None:
    """Adds 1e-6 mean to the diagonal, in the place of gram; 1 where gram is 0."""
    gram.diagonal().add_(torch.where(mean > 0, _RIDGE * mean, torch.where(mean.isnan(), mean, 1.0)))
