"""Merges of adapters that are not expanded: what is affine in its parents is a sum of factors on the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesearch.checkpoints.lowrank import LowRank, expanded
from mergesearch.engine.kernels.launch import TensorMerge
from mergesearch.engine.kernels.operands import Operands
from mergesearch.methods import Method


def is_factored(operands: Operands) -> bool:
    """Whether a model's tensor is held as factors."""
    return any(isinstance(model, LowRank) for model in operands.models)


def whole(operands: Operands) -> Operands:
    """The same with every tensor whole."""
    models = tuple(expanded(model) for model in operands.models)
    return Operands(operands.base, models, operands.names, operands.masks, operands.statistics)


def coefficients(method: Method, parameters: Mapping[str, Any], count: int) -> tuple[float, list[float]] | None:
    """Of a method that is affine in its parents: the sum of all parents' coefficients, and each model's.

    Where the method adds to the base, the base's coefficient makes the sum 1. None for any other method.
    """
    if method.name == "uniform_soup":
        return 1.0, [1 / count] * count
    if method.name not in ("linear", "task_arithmetic"):
        return None
    weights = [float(w) for w in parameters["weight"]]
    total = sum(weights)
    divisor = total if parameters["normalize"] and abs(total) >= 1e-8 else 1.0
    if method.name == "linear":
        return total / divisor, [w / divisor for w in weights]
    return 1.0, [float(parameters["lambda"]) * w / divisor for w in weights]


def merged(merge: TensorMerge, total: float, each: Sequence[float]) -> Tensor:
    """Writes sum_i c_i x_i + (total - sum_i c_i) base with x_i = W_i + s_i B_i A_i, without ever making an x_i.

    All factors of one base tensor go into one product, [c_1 s_1 B_1 .. c_T s_T B_T] [A_1; ..; A_T], in float32, and
    are rounded once with the rest.

    Returns:
        Whether the result is not finite (0-d).
    """
    base, models, out = merge.operands.base, merge.operands.models, merge.out
    # by the tensor that they lie on: the base's coefficient and those of the models on it make one
    starts: dict[int, tuple[Tensor, float]] = {}
    parts: list[tuple[float, LowRank]] = []
    for model, c in zip(models, each, strict=True):
        start = model.start if isinstance(model, LowRank) else model
        held = starts.get(id(start), (start, 0.0))
        starts[id(start)] = (start, held[1] + c)
        if isinstance(model, LowRank):
            parts.append((c * model.scale, model))
    first = base if base is not None else next(m.start for m in models if isinstance(m, LowRank))
    others = sum(c for key, (_, c) in starts.items() if key != id(first))
    if base is not None or id(first) in starts:
        starts[id(first)] = (first, total - others)
    summed: Tensor | None = None
    for tensor, c in starts.values():
        term = tensor.to(out.device).float()
        term = term if c == 1.0 else term * c
        summed = term if summed is None else summed + term
    assert summed is not None
    b = torch.cat([part.b.to(out.device) * c for c, part in parts], 1)
    a = torch.cat([part.a.to(out.device) for _, part in parts])
    product = b @ a
    result = (summed + (product.T if parts[0][1].turned else product)).to(out.dtype)
    out.copy_(result)
    return ~torch.isfinite(result).all()
