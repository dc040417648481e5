"""A parent once it is read, and how a candidate made of parents is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mergesearch.checkpoints.layout import Layout
from mergesearch.checkpoints.loading import Blueprint


@dataclass
class Checkpoint:
    """One parent, the base or a model, with its tensors.

    Attributes:
        reference: as the user wrote it.
        folder: where its files are; an adapter's own folder for a LoRA.
        live: its floating tensors by live name, each in the dtype of its file (float32 where a LoRA changed it).
        tensors: the same memory by the names of the files, fused ones apart.
    """

    reference: str
    folder: Path
    live: dict[str, Tensor] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class Form:
    """How a candidate is built and which tensors it has.

    Attributes:
        blueprint: how transformers builds them.
        layout: the tensors they are made of.
        origins: for each layer the parents' layer that it is like; None where that is the same one.
    """

    blueprint: Blueprint
    layout: Layout
    origins: tuple[int, ...] | None = None
