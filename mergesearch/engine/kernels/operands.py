"""What one tensor of a candidate is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergesearch.methods.masks import MaskKey


@dataclass(frozen=True)
class Operands:
    """What one tensor of a candidate is made of.

    Attributes:
        base: the base's tensor, as it is stored; None without a base.
        models: the models' tensors, as they are stored.
        names: for the base and each model what names its tensor; equal names are equal tensors.
        masks: the models' mask keys; empty for methods without masks.
        statistics: reads what a method of data goes by, one for each model; None for any other method.
    """

    base: Tensor | None
    models: tuple[Tensor, ...]
    names: tuple[Any, ...]
    masks: tuple[MaskKey, ...] = ()
    statistics: Callable[[], Sequence[Tensor | None]] | None = None

    def parents(self, which: Sequence[Any]) -> list[Tensor]:
        """The tensors of some parents: "base", or a model's number. The base is asked for only where there is one."""
        assert self.base is not None or "base" not in which
        return [self.base if self.base is not None and parent == "base" else self.models[parent] for parent in which]
