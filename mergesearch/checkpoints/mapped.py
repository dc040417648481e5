"""Parents that stay off the device: in the host's pinned memory, or on disk, their files mapped into memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mergesearch.checkpoints import checks
from mergesearch.checkpoints.checkpoint import Checkpoint
from mergesearch.checkpoints.devices import Devices
from mergesearch.checkpoints.files import Header, Source, weight_files
from mergesearch.checkpoints.loading import constants, stored_dtype
from mergesearch.checkpoints.lowrank import stored
from mergesearch.checkpoints.parents import Outline, Reader
from mergesearch.checkpoints.survey import Survey
from mergesearch.errors import CutError

# of each tensor, what is read to see whether the parents are related
_SAMPLE = 2**16
# MADV_PAGEOUT: pages of files are dropped, others stay, so that nothing can be lost
_PAGEOUT = 21
# torch rounds what it pins up to a power of two: tensors share blocks of this size
SLAB = 2**30
_ALIGN = 256


class PinnedReader(Reader):
    """As `Reader`, but the parents stay in host memory, from which a CUDA device copies while it computes."""

    def __init__(self, survey: Survey, devices: Devices, allow_unrelated: bool):
        super().__init__(survey, devices, allow_unrelated)
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._total = sum(t.nbytes for t in stored(t for live in survey.tensors.values() for t in live.values()))

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        size = _aligned(tensor.nbytes)
        if self._used + size > len(self._block):
            self._block = torch.empty(slab(size, self._total), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._used = 0
        there = self._block[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += size
        return there.copy_(tensor)


def slab(size: int, total: int) -> int:
    """Bytes of a new block of pinned memory that has room for `size`, of `total` that are to be pinned."""
    return max(_power(size), min(SLAB, _power(total)))


def slab_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the blocks of pinned memory that tensors of these sizes take in turn."""
    taken, room = 0, 0
    for size in map(_aligned, sizes):
        if size > room:
            room = slab(size, sum(sizes))
            taken += room
        room -= size
    return taken


def _power(size: int) -> int:
    """The power of two that is not below a size."""
    return 1 << max(0, size - 1).bit_length()


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class MappedReader(Reader):
    """As `Reader`, but a tensor is read when it is used. A parent whose files hold other tensors than the live model
    (adapters, renamed weights) is read whole.

    The numbers are checked in a sample of each tensor; NaN elsewhere is found when the tensor is merged.
    """

    @property
    def _maps(self) -> bool:
        return True

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    def _read(self, parent: Outline, source: Source, where: str) -> nn.Module:
        if not self.survey.maps(where):
            return super()._read(parent, source, where)
        (folder,) = self.survey.chain(source)
        tensors = mapped_tensors(folder, parent.headers, where)
        live = {name: tensors[name] for name in constants(parent.blank)}
        for piece in self.survey.layout.pieces:
            held = live if piece.whole else self.parts.setdefault(where, {})
            held[piece.live if piece.whole else piece.name] = tensors[piece.name]
        return _Mapped(parent.blank, live)

    def _check_numbers(self, base: Checkpoint, checkpoint: Checkpoint, where: str) -> None:
        few = [
            Checkpoint(c.reference, c.folder, {}, {name: t.reshape(-1)[:_SAMPLE] for name, t in c.tensors.items()})
            for c in (base, checkpoint)
        ]
        checks.numbers(few[0], few[1], where, self.allow_unrelated)


class _Mapped(nn.Module):
    """What stands in for a live model: those of its tensors that files hold whole, and which of its names are tied."""

    def __init__(self, blank: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self._blank, self._tensors = [blank], tensors

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:  # type: ignore[override]
        first: dict[int, Tensor] = {}
        mapped: dict[str, Tensor] = {}
        blank: dict[str, Tensor] = self._blank[0].state_dict(keep_vars=True)
        for name, tensor in blank.items():
            if name in self._tensors:
                first.setdefault(id(tensor), self._tensors[name])
            if id(tensor) in first:
                mapped[name] = first[id(tensor)]
        return mapped


def mapped_tensors(folder: Path, headers: dict[str, Header], where: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint's files by name, each a view of the file, which may not be written to: nothing is read.

    The files are mapped for reading alone, so that they count against no limit of what a process may write to.
    Format: https://github.com/huggingface/safetensors#format

    Raises:
        CutError: a file is no longer what its header, read before, said.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, where, "model"):
        try:
            tensors.update(_of_file(file, headers))
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:  # its header was read whole before
            raise CutError(
                f"{file} was cut or damaged while it was being read ({error}): put the whole file back, and type the "
                "same command again"
            ) from None
    return tensors


def _of_file(file: Path, headers: dict[str, Header]) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        if length > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header = json.loads(opened.read(length))
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, told in header.items():
        dtype = _dtype(told["dtype"]) if name in headers else None
        if dtype is not None:
            start, stop = told["data_offsets"]
            if not 0 <= start <= stop <= len(mapped) - 8 - length:
                raise ValueError(f"tensor {name} lies beyond its end")
            tensors[name] = _view(mapped, 8 + length + start, stop - start, dtype).view(told["shape"])
    return tensors


def _dtype(name: str) -> torch.dtype | None:
    others = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    return stored_dtype(Header((), name)) or {**others, "BOOL": torch.bool}.get(name)


def _view(mapped: mmap.mmap, offset: int, size: int, dtype: torch.dtype) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be written to
        raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset, count=size)
    if offset % dtype.itemsize:
        raw = raw.clone()  # no kernel reads numbers that lie across the boundaries of their size
    return raw.view(dtype)


def release(tensors: Iterable[Tensor]) -> None:
    """Tells the system that mapped tensors are not needed for now: their pages no longer count as this process's."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        for tensor in tensors:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)
