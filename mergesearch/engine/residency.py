"""Where the parents are held while candidates are made, and what that takes: chosen before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergesearch import memory
from mergesearch.checkpoints import Devices, Residency, Survey, choose_device, slab_bytes
from mergesearch.checkpoints.lowrank import stored
from mergesearch.engine import kernels
from mergesearch.engine.splitting import split
from mergesearch.errors import UserError

# what is needed beside pool and candidate: kept statistics and blocks, as a share of both
OVERHEAD = 0.05
# of the free memory, what a pool and a candidate may take: the rest is for scoring
SHARE = 0.8
# and what may be taken in all: allocators round, other programs grow
MOST = 0.95
# of what is left, the share for statistics of the parents that some methods keep
_KEPT = 0.25
# requests at once that a residency has to leave room for, where the batch size is found by trying
_ROWS = 8
MODES: tuple[Residency, ...] = ("device", "pinned", "mapped")


@dataclass(frozen=True)
class Needs:
    """What a pool, its candidates and their scoring take, in bytes.

    Attributes:
        parents: of the base and all models, in the dtypes of their files; what they share once.
        candidate: of one candidate in its out_dtype.
        made: of the parents, what no file holds as it is, so that it is in memory even where the others are mapped.
        pinned: of the parents in blocks of pinned memory; as `parents` where that is not known.
        row: of scoring, for each request of a batch.
        scoring: of scoring, however small a batch is.
        rows: requests at once, as they were asked for; None: as many as fit.
        most: the most requests at once.
        blank: a candidate on the meta device, for splitting it; None where it cannot be split.
        dtype: of the candidate.
    """

    parents: int
    candidate: int
    made: int = 0
    pinned: int = 0
    row: int = 0
    scoring: int = 0
    rows: int | None = None
    most: int = 64
    blank: Any = field(default=None, repr=False)
    dtype: torch.dtype | None = None

    @property
    def overhead(self) -> int:
        """Of blocks, and of small statistics that are kept."""
        return int(OVERHEAD * (self.parents + self.candidate))

    def scored(self, rows: int) -> int:
        """Of scoring with so many requests at once."""
        return max(self.scoring, rows * self.row)

    def fitting(self, room: int) -> int:
        """The most requests at once that fit into a room, a power of two or `most`; 1 where none does."""
        count = room // self.row if self.row else self.most
        return self.most if count >= self.most else 1 << max(0, int(count).bit_length() - 1)


@dataclass(frozen=True)
class Holding:
    """How a pool is held.

    Attributes:
        mode: "device": all where candidates are made; "pinned": the parents in pinned host memory, copied while the
            device computes; "mapped": the parents in their files, read when they are merged. What `Pool.read` takes.
        devices: where candidates are made.
        device_bytes, host_bytes: the peak on the devices together and in the host's memory, files mapped into memory
            apart.
        free_device, free_host: what is free there now.
        scoring: of the peak on the devices, what is for scoring.
        rows: requests at once that this has room for.
        kept: beside the peak, what statistics of the parents may take, which some methods keep where there is room.
        needs: what it was made from.
    """

    mode: Residency
    devices: Devices
    device_bytes: int
    host_bytes: int
    free_device: int
    free_host: int
    scoring: int
    rows: int
    kept: int
    needs: Needs = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether the peak fits into what is free."""
        return self.device_bytes <= self.free_device and self.host_bytes <= self.free_host

    @property
    def possible(self) -> bool:
        """Whether it fits but for scoring, which asks for less at once where memory runs out."""
        return self.device_bytes - self.scoring <= self.free_device and self.host_bytes <= self.free_host

    @property
    def on_host(self) -> bool:
        """Whether candidates are made in the host's memory."""
        return self.devices.main.type == "cpu"

    def __str__(self) -> str:
        held = {
            "device": f"parents and candidate in memory on {self.devices}",
            "pinned": f"parents in pinned host memory, the candidate on {self.devices}",
            "mapped": f"parents read from their files, the candidate in memory on {self.devices}",
        }[self.mode]
        split_over = ", split between them" if self.devices.parts else ""
        on_device = f"{size_text(self.device_bytes)} of {size_text(self.free_device)} free on {self.devices}"
        scoring = f" ({size_text(self.scoring)} for scoring)" if self.scoring else ""
        on_host = f", {size_text(self.host_bytes)} of {size_text(self.free_host)} free on the host"
        return f"{held}{split_over}; peak {on_device}{scoring}{on_host if not self.on_host else ''}"


def needs_of(survey: Survey, dtype: torch.dtype) -> Needs:
    """What a pool takes, by its files' headers; scoring is not in it."""
    tensors = stored(t for parent in survey.tensors.values() for t in parent.values())
    made = stored(survey.tensors[where][name] for where in survey.sources for name in survey.made(where))
    candidate = sum(torch.Size(info.shape).numel() for info in survey.form.layout.infos) * dtype.itemsize
    return Needs(
        parents=_bytes(tensors),
        candidate=candidate,
        made=_bytes(made),
        pinned=slab_bytes([t.nbytes for t in tensors]),
        blank=survey.blank,
        dtype=dtype,
    )


def residency(needs: Needs, device: str = "auto", wanted: str = "auto", held: int = 0) -> Holding:
    """The first of device, pinned host memory and mapped files that has room for the pool, by what is free now.

    Args:
        needs: bytes.
        device: `auto`, `cpu`, `cuda` or `cuda:N`, where candidates are made. With `auto` a candidate that does not fit
            one GPU is split over those that are visible.
        wanted: one of `MODES` whether it fits or not, or `auto`.
        held: bytes of the pool that are in memory already, and count as free.

    Raises:
        UserError: no such device; `pinned` without a CUDA device.
    """
    main = choose_device(device)
    if main.type == "cpu" and wanted == "pinned":
        raise UserError("memory is 'pinned', which holds parents beside a GPU, and candidates are on the CPU: use auto")
    if main.type == "cpu":
        return _on_host(needs, wanted, held)
    every = memory.accelerators() if device == "auto" else [main]
    alone = needs.candidate + needs.overhead + _working(main) + needs.scored(needs.rows or 1)
    if alone > MOST * memory.free(main) and len(every) > 1 and needs.blank is not None:
        return _split(needs, every, wanted)
    return _on_device(needs, Devices(main), wanted, held)


def _on_host(needs: Needs, wanted: str, held: int) -> Holding:
    free = memory.free_on_host() + held
    whole = needs.parents + needs.candidate + needs.overhead
    alone = needs.made + needs.candidate + needs.overhead
    fits = whole <= SHARE * free and whole + needs.scored(needs.rows or _ROWS) <= MOST * free
    mode: Residency = "device" if wanted == "device" or (wanted == "auto" and fits) else "mapped"
    return _holding(needs, mode, Devices(torch.device("cpu")), whole if mode == "device" else alone, 0, free, free)


def _on_device(needs: Needs, devices: Devices, wanted: str, held: int = 0) -> Holding:
    free, host = sum(map(memory.free, devices.every)) + held, memory.free_on_host()
    working = needs.overhead + sum(map(_working, devices.every))
    scored = needs.scored(needs.rows or _ROWS)
    whole, alone = needs.parents + needs.candidate + working, needs.candidate + working
    pinned = max(needs.pinned, needs.parents)
    room = {
        "device": whole <= SHARE * free and whole + scored <= MOST * free,
        "pinned": pinned <= SHARE * host,
        "mapped": True,
    }
    mode: Residency = next(mode for mode in MODES if mode == wanted or (wanted == "auto" and room[mode]))
    taken = {"device": (whole, 0), "pinned": (alone, pinned), "mapped": (alone, needs.made)}[mode]
    return _holding(needs, mode, devices, *taken, free, host)


def _split(needs: Needs, every: Sequence[torch.device], wanted: str) -> Holding:
    """A candidate over several devices: with the parents beside their parts where all together have room, else over the
    fewest that hold it."""
    beside = (needs.parents + needs.candidate) / max(1, needs.candidate)
    modes = [("device", beside)] if wanted in ("auto", "device") else []
    if wanted != "device":
        modes.append((_elsewhere(needs, wanted), 1.0))
    for mode, share in modes:
        for count in range(2, len(every) + 1):
            used = every[:count]
            each = needs.scored(needs.rows or 1) // count
            room = {d: int((SHARE * memory.free(d) - _working(d) - each) / share) for d in used}
            parts = split(needs.blank, room, needs.dtype)
            if parts is not None:
                return _on_device(needs, Devices(used[0], parts), mode)
    return _on_device(needs, Devices(every[0]), wanted)


def _elsewhere(needs: Needs, wanted: str) -> str:
    if wanted in ("pinned", "mapped"):
        return wanted
    return "pinned" if max(needs.pinned, needs.parents) <= SHARE * memory.free_on_host() else "mapped"


def _holding(
    needs: Needs, mode: Residency, devices: Devices, on_device: int, on_host: int, free: int, host: int
) -> Holding:
    left = int(MOST * free) - on_device
    rows = needs.rows or needs.fitting(left)
    scoring = needs.scored(rows)
    kept = max(0, int(_KEPT * (left - scoring)))
    return Holding(mode, devices, on_device + scoring, on_host, free, host, scoring, rows, kept, needs)


def _working(device: torch.device) -> int:
    """What merging holds on a device whatever the models' size: buffers to copy through, blocks of statistics."""
    return 0 if device.type == "cpu" else kernels.WORKING


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def size_text(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
