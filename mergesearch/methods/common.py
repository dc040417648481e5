"""Parameters that several methods share, and the few lines of arithmetic that every family uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, cast

import torch
from torch import Tensor

from mergesearch.methods.listening import statistic
from mergesearch.methods.registry import Parameter

# 32 MiB of float64: a dot product of a whole embedding needs no more
_BLOCK = 2**22

Scalar = float | Tensor
Scalars = Scalar | Sequence[Scalar]

Weights = Annotated[
    Scalars,
    Parameter(per_model=True, search=(0.0, 1.0), meaning="the coefficient of each model; negative ones subtract it"),
]
Normalize = Annotated[bool, Parameter(kind="bool", meaning="divide by the sum of the weights that took part")]


def per_model(values: Scalars, models: Sequence[Tensor]) -> Sequence[Scalar]:
    """`values` as one scalar for each model."""
    if isinstance(values, Sequence):
        return values
    return [values] * len(models)


def scalar(value: Scalar) -> Tensor:
    """`value` as a 0-d float64 tensor: it follows any tensor's dtype and device, and its value needs no branch."""
    return torch.as_tensor(value, dtype=torch.float64)


def added(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor or more, in their order."""
    return cast(Tensor, sum(terms))


def total(values: Sequence[Scalar]) -> Tensor:
    """The sum of scalars, 0-d float64."""
    return added(scalar(v) for v in values)


def nonzero(divisor: Tensor, least: float) -> Tensor:
    """`divisor` with 1 in the place of everything whose magnitude is below `least`."""
    return torch.where(divisor.abs() < least, torch.ones_like(divisor), divisor)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """sum_i w_i x_i, in the tensors' dtype."""
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged = merged + tensor * weight
    return merged


@statistic(how="sum")
def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_j a_j b_j over all elements, 0-d float64: products and sums in float64, so the order hardly matters."""
    blocks = zip(a.flatten().split(_BLOCK), b.flatten().split(_BLOCK), strict=True)
    return added((x.double() * y.double()).sum() for x, y in blocks)


@statistic(how="sum")
def gram(tensors: Sequence[Tensor]) -> Tensor:
    """All dot products of N tensors as flat vectors, (N, N) float64: what every angle and norm is made of."""
    rows = [[dot(a, b) for b in tensors[: i + 1]] for i, a in enumerate(tensors)]
    full = [[rows[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]
    return torch.stack([torch.stack(row) for row in full])


@statistic()
def rows_gram(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """As `gram`, for each vector along `dim`: (N, N, ...) float64 with that dimension kept as 1."""
    wide = [t.double() for t in tensors]
    return torch.stack([torch.stack([(a * b).sum(dim, keepdim=True) for b in wide]) for a in wide])


def norms(products: Tensor) -> Tensor:
    """The norms of N tensors from their (N, N, ...) products, (N, ...)."""
    return torch.stack([products[i, i] for i in range(len(products))]).sqrt()


def cosine(products: Tensor, i: int, j: int, floor: float = 0.0) -> Tensor:
    """The cosine between vectors i and j of `products`; 0, a right angle, where one of them is zero.

    A product of norms below `floor` counts as `floor`, which draws the angle towards a right one.
    """
    lengths = (products[i, i].sqrt() * products[j, j].sqrt()).clamp(min=floor)
    zero = lengths == 0
    return torch.where(zero, 0.0, products[i, j] / torch.where(zero, 1.0, lengths)).clamp(-1.0, 1.0)
