"""Marking what a method of matrices does, element by element, to tensors that a decomposition gave.

Such a part is a plain function as a method is: elementwise but for its own statistics, with annotated parameters.
Called plainly it runs. A fast path that listens (`methods.listening`) is given the call and may make it in one pass, as
it makes a method's tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergesearch.methods.listening import Statistic, heard
from mergesearch.methods.registry import Method, unnamed


@dataclass(frozen=True)
class MethodPart(Statistic):
    """A marked part.

    Attributes:
        method: the part as a method, whose models are the tensors that it is called with.
    """

    method: Method


def part(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Marks `f(base, models, *, ...) -> Tensor`: base is None, models float32 or float64 tensors of one shape that a
    decomposition gave, the result float64 of that shape; keyword parameters as a method's."""
    marked = MethodPart(function, "part", False, unnamed(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return heard(marked, args, kwargs)

    return call
