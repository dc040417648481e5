"""Marking what of a method looks at whole tensors, so that a fast path may listen.

A method is a plain function. Whatever in it looks at a whole tensor (a threshold, a norm, ranks) is a call of a
function marked with `statistic`; what is left is elementwise. Called plainly, a marked function just runs. A fast path
may listen with `listening`: it is then given each call instead of its result. So it can keep statistics between
candidates and compile the elementwise rest, and the method's file knows nothing of it. A method that marks nothing is
right all the same, and slower.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

How = Literal["whole", "sum", "rows", "order", "uniform", "matrix", "part"]
Listener = Callable[["Statistic", tuple[Any, ...], dict[str, Any]], Any]

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener", default=None)


@dataclass(frozen=True)
class Statistic:
    """A marked function.

    Attributes:
        function: the plain definition.
        how: how it may be computed piece by piece. "whole": not at all; "sum": the sum of what it gives for blocks of
            its tensors, taken flat; "rows": what it gives for blocks of rows (the last dimension), one after another;
            "order": the k-th smallest of its first argument, k its second; "uniform": random numbers by counter;
            "matrix": not at all: a decomposition of whole parents, from which several tensors of any shapes come out;
            its arguments are the base's and the models' tensors themselves, and numbers that few candidates change;
            "part": no statistic at all, but what a method does to tensors that such decompositions gave: see
            `methods.parts`.
        per_element: whether the result has its tensors' shape; otherwise it is small.
    """

    function: Callable[..., Any]
    how: How
    per_element: bool

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def statistic(*, how: How = "whole", per_element: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function of whole tensors, see `Statistic`. Called plainly it does what it did before."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        marked = Statistic(function, how, per_element)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return heard(marked, args, kwargs)

        return call

    return mark


def heard(marked: Statistic, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of a marked function gives: the listener's answer, or its own."""
    listener = _listener.get()
    return marked.function(*args, **kwargs) if listener is None else listener(marked, args, kwargs)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Within it, in this thread, calls of marked functions go to `listener`; None: they run plainly."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@statistic(how="order")
def kth_smallest(values: Tensor, k: int | Tensor) -> Tensor:
    """The k-th smallest of all elements, k from 1 on; 0-d, of the values' dtype."""
    return torch.kthvalue(values.flatten(), int(k)).values


@statistic(how="sum")
def count_nonzero(values: Tensor) -> Tensor:
    """How many elements are not 0; 0-d float64, so exact up to 2^53."""
    return (values != 0).sum().double()
