"""A pool of random numbers in the shapes of a real one: what `check` tries for time, so that it reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mergesearch.checkpoints import Checkpoint, Devices, Pool, constants

# so many random numbers stand for those of every tensor; an odd count, so that rows differ
_NUMBERS = 2**20 + 7
# about as large as a language model's weights: activations stay finite
_SCALE = 0.02


def imagined(outline: Pool, devices: Devices) -> Pool:
    """A pool whose parents all have the same random tensors, in memory once.

    Args:
        outline: of `Pool.outline`.
        devices: where they are.
    """
    numbers = _SCALE * torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0))
    live = {name: _filled(tensor, numbers, devices.of(name)) for name, tensor in outline.base.live.items()}
    tensors = outline.form.layout.views(live)
    models = {name: _with(model, live, tensors) for name, model in outline.models.items()}
    fixed = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=devices.of(name))
        for name, tensor in constants(outline.form.blueprint.blank()).items()
    }
    base = _with(outline.base, live, tensors)
    return replace(outline, base=base, models=models, device=devices.main, parts=devices.parts, constants=fixed)


def _with(parent: Checkpoint, live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Checkpoint:
    return replace(parent, live=dict(live), tensors=dict(tensors))


def _filled(blank: Tensor, numbers: Tensor, device: torch.device) -> Tensor:
    filled = torch.empty(blank.shape, dtype=blank.dtype, device=device)
    for part in filled.view(-1).split(len(numbers)):
        part.copy_(numbers[: len(part)])
    return filled
