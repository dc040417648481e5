"""Parameters that several methods share, and the few lines of arithmetic that every family uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.registry import Parameter

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


def total(values: Sequence[Scalar]) -> Tensor:
    """The sum of scalars, 0-d float64."""
    return sum(scalar(v) for v in values)


def nonzero(divisor: Tensor, least: float) -> Tensor:
    """`divisor` with 1 in the place of everything whose magnitude is below `least`."""
    return torch.where(divisor.abs() < least, torch.ones_like(divisor), divisor)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """sum_i w_i x_i, in the tensors' dtype."""
    merged = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged = merged + tensor * weight
    return merged
