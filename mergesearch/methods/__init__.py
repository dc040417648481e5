"""Every merge method as one pure torch function: the semantics that each fast path must equal.

A method is a function `f(base, models, *, parameters...) -> Tensor` with the decorator `method`; a new file in this
folder is enough to add one. Its signature is its schema: `get(name).parameters` feeds the recipe's validation, the
search space and `describe()`.
"""

from __future__ import annotations

from mergesearch.methods import masks
from mergesearch.methods.masks import MaskKey, mask_key, uniform
from mergesearch.methods.registry import (
    Method,
    Parameter,
    Wrapper,
    data_names,
    describe,
    describe_wrappers,
    get,
    get_wrapper,
    method,
    names,
    wrapper,
    wrappers,
)

__all__ = [
    "MaskKey",
    "Method",
    "Parameter",
    "Wrapper",
    "data_names",
    "describe",
    "describe_wrappers",
    "get",
    "get_wrapper",
    "mask_key",
    "masks",
    "method",
    "names",
    "uniform",
    "wrapper",
    "wrappers",
]
