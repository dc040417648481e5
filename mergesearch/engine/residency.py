"""Where the parents are held while candidates are made, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergesearch import memory
from mergesearch.checkpoints import Residency

# what is needed beside pool and candidate: kept statistics and blocks, as a share of both
OVERHEAD = 0.05
# of the free memory, what a pool may take: the rest is for scoring
SHARE = 0.8


@dataclass(frozen=True)
class Holding:
    """How a pool is held.

    Attributes:
        mode: "device": all on the device; "pinned": the parents in pinned host memory, copied while the device
            computes; "mapped": the parents in their files, read when they are merged. What `Pool.load` takes.
        device: where candidates are made.
        device_bytes, host_bytes: the peak on the device and in the host's memory, files mapped into memory apart.
        free_device, free_host: what is free there now.
    """

    mode: Residency
    device: str
    device_bytes: int
    host_bytes: int
    free_device: int
    free_host: int

    @property
    def fits(self) -> bool:
        """Whether the peak fits into what is free."""
        return self.device_bytes <= self.free_device and self.host_bytes <= self.free_host

    def __str__(self) -> str:
        held = {
            "device": f"parents and candidate in memory on {self.device}",
            "pinned": f"parents in pinned host memory, the candidate on {self.device}",
            "mapped": f"parents read from their files, the candidate in memory on {self.device}",
        }[self.mode]
        on_device = f"{_gib(self.device_bytes)} of {_gib(self.free_device)} free on {self.device}"
        on_host = f", {_gib(self.host_bytes)} of {_gib(self.free_host)} free on the host"
        return f"{held}; peak {on_device}{on_host if self.device != 'cpu' else ''}"


def residency(pool_bytes: int, candidate_bytes: int, device: torch.device | str, held: int = 0) -> Holding:
    """The first of device, pinned host memory and mapped files that has room for the pool, by what is free now.

    Args:
        pool_bytes: of the base and all models, in the dtypes of their files.
        candidate_bytes: of one candidate in its out_dtype.
        device: where candidates are made.
        held: bytes of the pool that are on the device already, and count as free.
    """
    device = torch.device(device)
    host = memory.free_on_host() + (held if device.type == "cpu" else 0)
    free = memory.free(device) + held if device.type == "cuda" else host
    extra = int(OVERHEAD * (pool_bytes + candidate_bytes))
    whole, alone = pool_bytes + candidate_bytes + extra, candidate_bytes + extra
    on_host = device.type == "cpu"
    if whole <= SHARE * free:
        return Holding("device", str(device), whole, whole if on_host else 0, free, host)
    if not on_host and pool_bytes <= SHARE * host:
        return Holding("pinned", str(device), alone, pool_bytes, free, host)
    return Holding("mapped", str(device), alone, alone if on_host else 0, free, host)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
