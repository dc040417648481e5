"""How much memory is free, the one place that asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free(device: torch.device) -> int:
    """Bytes that can be had on a device now, without swapping.

    On a CUDA device what its driver has left, and what torch holds there and does not use; on every other device what
    the host has available.
    """
    if device.type != "cuda":
        return free_on_host()
    import torch

    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def free_on_host() -> int:
    """Bytes of the host's memory that can be had now, without swapping."""
    import psutil

    return psutil.virtual_memory().available
