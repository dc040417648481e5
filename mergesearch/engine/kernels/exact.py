"""Divisions on CUDA devices rounded as they are on the CPU."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def exact_division(device: torch.device) -> Any:
    """Within it a tensor on a CUDA device is divided by a scalar as the CPU does it.

    torch multiplies there by the scalar's reciprocal, which may differ in the last bit; a threshold then misses the
    very element that it is, and a mask drops another one.
    """
    return _Division() if device.type == "cuda" else contextlib.nullcontext()


class _Division(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load torch._dynamo for it, which takes seconds
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and _by_scalar(*args):
            args = (args[0], torch.as_tensor(args[1], dtype=_dtype(*args)).to(args[0].device))
        return func(*args, **(kwargs or {}))


def _by_scalar(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) or left.device.type != "cuda":
        return False
    return isinstance(right, numbers.Number) or (right.ndim == 0 and right.device.type == "cpu")


def _dtype(left: Tensor, right: Any) -> torch.dtype:
    return left.dtype if left.is_floating_point() else torch.get_default_dtype()
