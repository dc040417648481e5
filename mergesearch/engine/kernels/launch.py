"""Many tensors as one table of pointers: what a built program is called with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.program import WINDOW, Program
from mergesearch.methods.masks import MaskKey


@dataclass(frozen=True)
class TensorMerge:
    """One tensor to make: what from, where to, and what it is called in messages."""

    operands: Operands
    out: Tensor
    label: str


class AlikeMerges:
    """Merges of one shape, one set of dtypes and devices."""

    def __init__(self, merges: Sequence[TensorMerge]):
        self.merges: list[TensorMerge] = list(merges)
        self.operands: list[Operands] = [merge.operands for merge in merges]
        self.out: Tensor = merges[0].out
        first = self.operands[0]
        named = repr([(tuple(one.names), tuple(one.masks)) for one in self.operands])
        self.token: bytes = hashlib.blake2b(named.encode(), digest_size=16).digest()
        outs = [merge.out for merge in merges]
        parents = [t for one in self.operands for t in (*one.models, one.base) if t is not None]
        contiguous = all(t.is_contiguous() for t in (*outs, *parents))
        self.whole: bool = first.models[0].numel() > 0 and contiguous


class MergeSet:
    """Merges in groups; whoever makes candidates of the same tensors again and again keeps it.

    Args:
        merges: their tensors may get other memory later, but no other shape, dtype or device.
    """

    def __init__(self, merges: Sequence[TensorMerge]):
        by_kind: dict[Any, list[TensorMerge]] = {}
        for merge in merges:
            by_kind.setdefault(_kind(merge), []).append(merge)
        groups = [AlikeMerges(alike) for alike in by_kind.values()]
        # the most work first: a device is busy with it while the other groups are prepared
        self.groups: list[AlikeMerges] = sorted(groups, key=lambda g: -len(g.merges) * g.out.numel())
        self.launches: dict[Any, Launch] = {}

    def __iter__(self) -> Iterator[TensorMerge]:
        return (merge for group in self.groups for merge in group.merges)


def _kind(merge: TensorMerge) -> Any:
    tensors = [t for t in (merge.operands.base, *merge.operands.models) if t is not None]
    contiguous = all(t.is_contiguous() for t in (merge.out, *tensors))
    # a parent that is held as factors is of another kind than one that is whole
    kinds = tuple((type(t), t.dtype, t.device) for t in (merge.out, *tensors))
    return (tuple(merge.out.shape), merge.operands.base is None, kinds, contiguous)


class Launch:
    """The tensors of groups that share a program, cut into spans that a 32-bit index reaches.

    Attributes:
        counts: (T,) int64, elements of each span. firsts: (T + 1,) int64, the number of its first chunk.
        pointers: (T, 1 + arguments) int64: the result, the program's arguments. scalars: (T or 1, S) float64.
        keys: (T, K) int32. On a CUDA device `rows` holds firsts, counts and pointers, `places` the span of each chunk.
        aligned: every pointer is a multiple of 16.
        owners: for each span its tensor's number.
    """

    def __init__(self, sizes: Sequence[int], masks: Sequence[Sequence[MaskKey]], program: Program, chunk: int,
                 device: torch.device, span: int = WINDOW):  # fmt: skip
        self.device = device
        cuts = [(i, start, min(span, n - start)) for i, n in enumerate(sizes) for start in range(0, n, span)]
        self.owners: Tensor = torch.tensor([i for i, _, _ in cuts])
        self.starts: list[int] = [start for _, start, _ in cuts]
        self.counts: Tensor = torch.tensor([n for _, _, n in cuts])
        self.firsts: Tensor = torch.zeros(len(cuts) + 1, dtype=torch.int64)
        chunks = (self.counts + chunk - 1) // chunk
        self.firsts[1:] = chunks.cumsum(0)
        keys = torch.tensor([program.keys(masks[i], start) for i, start, _ in cuts], dtype=torch.int32)
        self.keys: Tensor = keys.to(device)
        self.aligned: bool = False
        self._held: list[list[int]] = []
        if device.type != "cpu":
            places = torch.repeat_interleave(torch.arange(len(cuts), dtype=torch.int32), chunks)
            self.places: Tensor = places.to(device)

    def set(self, tensors: Sequence[Sequence[Tensor]], scalars: Tensor) -> None:
        """Points to these tensors (for each merge the result, then the arguments) with these scalars."""
        pointers = [[t.data_ptr() for t in one] for one in tensors]
        if len(self.owners) > len(tensors):
            sizes = [[t.element_size() for t in one] for one in tensors]
            pointers = [
                [p + start * size for p, size in zip(pointers[i], sizes[i], strict=True)]
                for i, start in zip(self.owners.tolist(), self.starts, strict=True)
            ]
        if len(scalars) > 1 and len(self.owners) > len(tensors):
            scalars = scalars[self.owners]
        if pointers != self._held:
            self._point(pointers)
        self.scalars: Tensor = scalars.contiguous().to(self.device, non_blocking=True)

    def _point(self, pointers: list[list[int]]) -> None:
        self._held = pointers
        self.pointers: Tensor = torch.tensor(pointers)
        self.aligned = all(p % 16 == 0 for row in pointers for p in row)
        if self.device.type != "cpu":
            rows = torch.cat([self.firsts[:-1, None], self.counts[:, None], self.pointers], 1)
            self.rows: Tensor = rows.to(self.device)


class Kernel(Protocol):
    """What is built of a program.

    Attributes:
        chunk: how many elements a launch's chunks have.
    """

    chunk: int

    def __call__(self, launch: Launch) -> Tensor:
        """Makes the launch's tensors; (spans,) bool comes back, true where a span has NaN or infinity."""
        ...
