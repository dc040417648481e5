"""A candidate's modules over several devices, by accelerate's device map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergesearch.checkpoints import Devices


def split(
    blank: Any, room: Mapping[torch.device, int], dtype: torch.dtype | None = None
) -> dict[str, torch.device] | None:
    """Which device each module lives on, by the beginning of its tensors' names; None where they do not fit.

    No decoder layer is cut, and tied tensors stay together.

    Args:
        blank: a model of transformers on the meta device.
        room: bytes that may be filled on each device, in the order in which the model goes through them.
        dtype: of the weights; None: the blank's.
    """
    from accelerate import infer_auto_device_map

    if any(size <= 0 for size in room.values()):
        return None
    devices = list(room)
    blank.tie_weights()
    found = infer_auto_device_map(
        blank,
        max_memory={number: room[device] for number, device in enumerate(devices)},
        no_split_module_classes=list(blank._no_split_modules or []),
        dtype=dtype,
    )
    numbers = {name: place for name, place in found.items() if isinstance(place, int)}
    if len(numbers) < len(found):
        return None  # some of it was left for the host or the disk
    return {name: devices[number] for name, number in numbers.items()}


def dispatch(model: Any, devices: Devices) -> Any:
    """A live model on these devices: what was somewhere else is moved."""
    if not devices.parts:
        return model.to(devices.main)
    from accelerate import dispatch_model

    return dispatch_model(model, device_map=dict(devices.map or {}), main_device=devices.main)
