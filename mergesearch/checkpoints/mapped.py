"""Parents that stay off the device: in the host's pinned memory, or on disk, their files mapped into memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mergesearch.checkpoints import checks
from mergesearch.checkpoints.checkpoint import Checkpoint
from mergesearch.checkpoints.files import Header, Source, weight_files
from mergesearch.checkpoints.loading import state
from mergesearch.checkpoints.parents import Outline, Reader
from mergesearch.errors import CutError

# of each tensor, what is read to see whether the parents are related
_SAMPLE = 2**16
# MADV_PAGEOUT: pages of files are dropped, others stay, so that nothing can be lost
_PAGEOUT = 21


class PinnedReader(Reader):
    """As `Reader`, but the parents stay in host memory, from which a CUDA device copies while it computes."""

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if torch.cuda.is_available() else tensor


class MappedReader(Reader):
    """As `Reader`, but a tensor is read when it is used. A parent whose files hold other tensors than the live model
    (adapters, fused experts, renamed weights) is read whole.

    The numbers are checked in a sample of each tensor; NaN elsewhere is found when the tensor is merged.
    """

    @property
    def _maps(self) -> bool:
        return True

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor

    def _read(self, parent: Outline, source: Source, where: str) -> nn.Module:
        folder, *adapters = self._chain(source)
        live = state(parent.blank)
        if adapters or any(
            parent.headers.get(n) is None or parent.headers[n].shape != t.shape for n, t in live.items()
        ):
            return super()._read(parent, source, where)
        return _Mapped(parent.blank, mapped_tensors(folder, parent.headers, where, live))

    def _check_numbers(self, base: Checkpoint, checkpoint: Checkpoint, where: str) -> None:
        few = [
            Checkpoint(c.reference, c.folder, {}, {name: t.reshape(-1)[:_SAMPLE] for name, t in c.tensors.items()})
            for c in (base, checkpoint)
        ]
        checks.numbers(few[0], few[1], where, self.allow_unrelated)


class _Mapped(nn.Module):
    """What stands in for a live model: its tensors by name, and which of its names are tied."""

    def __init__(self, blank: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self._blank, self._tensors = [blank], tensors

    def state_dict(self, *_: object, **__: object) -> dict[str, Tensor]:  # type: ignore[override]
        first: dict[int, Tensor] = {}
        mapped: dict[str, Tensor] = {}
        blank: dict[str, Tensor] = self._blank[0].state_dict(keep_vars=True)
        for name, tensor in blank.items():
            mapped[name] = first.setdefault(id(tensor), self._tensors.get(name, tensor))
        return mapped


def mapped_tensors(folder: Path, headers: dict[str, Header], where: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint's files by name, each a view of the file: nothing is read yet."""
    wanted, tensors = set(names), {}
    for file in weight_files(folder, where, "model"):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in wanted & set(opened.keys()):
                    tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:  # its header was read whole
            raise CutError(
                f"{file} was cut or damaged while it was being read ({error}): put the whole file back, and type the "
                "same command again"
            ) from None
    return tensors


def release(tensors: Iterable[Tensor]) -> None:
    """Tells the system that mapped tensors are not needed for now: their pages no longer count as this process's."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        for tensor in tensors:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)
