"""Methods that move tensors as they are: what layer stacking is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from mergesearch.methods.common import Scalar
from mergesearch.methods.registry import Parameter, method

Scale = Annotated[Scalar, Parameter(meaning="what the tensor is multiplied by")]


@method(paper="no paper", family="structure", base="unused", max_models=1)
def passthrough(base: Tensor | None, models: Sequence[Tensor], *, scale: Scale = 1.0) -> Tensor:
    """Take one model's tensor, times a scale: with layer ranges of several models this stacks layers (frankenmerge).

    scale * x. scale: any number, 1 (which gives x bit for bit). One model of any shape; returns that shape.
    """
    return models[0] * scale
