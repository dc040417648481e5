"""Parents in host memory, candidates on a CUDA device: copies that run while the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergesearch.engine.kernels.launch import Launch
from mergesearch.engine.kernels.program import Program
from mergesearch.methods.masks import MaskKey

# bytes of one of the two buffers on the device
SIZE = 2**27
_ALIGN = 256


class DoubleBuffer:
    """Two buffers on a device: while a kernel reads one, the next tensors are copied to the other.

    Copies from pinned memory overlap; from other memory they are done first, and the result is the same.
    """

    def __init__(self, device: torch.device, size: int = SIZE):
        self.device = device
        self.size = size
        self._buffers: list[Tensor] = []
        self._copied: list[Any] = []
        self._read: list[Any] = []

    def run(
        self, kernel: Any, program: Program, tensors: Sequence[Sequence[Tensor]], masks: Sequence[Sequence[MaskKey]],
        scalars: Tensor,
    ) -> Tensor:  # fmt: skip
        """Makes tensors (for each the result on the device, then its arguments); which are not finite, (tensors,)."""
        with torch.cuda.device(self.device):
            self._open()
            loads = self._loads(tensors)
            bad = []
            for number, load in enumerate(loads):
                bad.append(self._one(kernel, program, tensors, masks, scalars, load, number % 2))
            owners = torch.tensor([i for load in loads for i, _, _ in load])
            return by_tensor(torch.cat(bad), owners, len(tensors))

    def _open(self) -> None:
        if not self._buffers:
            self._side = torch.cuda.Stream(self.device)
            self._buffers = [torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self._copied = [torch.cuda.Event() for _ in range(2)]
            self._read = [torch.cuda.Event() for _ in range(2)]
            self._side.wait_stream(torch.cuda.current_stream())

    def _loads(self, tensors: Sequence[Sequence[Tensor]]) -> list[list[tuple[int, int, int]]]:
        """What fits into one buffer at a time: lists of (tensor, first element, elements)."""
        loads: list[list[tuple[int, int, int]]] = [[]]
        room = self.size
        for number, (out, *arguments) in enumerate(tensors):
            each = sum(t.element_size() for t in arguments)
            start, left = 0, out.numel()
            while left:
                fits = (room - _ALIGN * len(arguments)) // each // 64 * 64
                if fits < min(left, 2**16):
                    loads.append([])
                    room = self.size
                    continue
                count = min(left, fits)
                loads[-1].append((number, start, count))
                room -= count * each + _ALIGN * len(arguments)
                start, left = start + count, left - count
        return [load for load in loads if load]

    def _one(
        self, kernel: Any, program: Program, tensors: Sequence[Sequence[Tensor]], masks: Sequence[Sequence[MaskKey]],
        scalars: Tensor, load: list[tuple[int, int, int]], side: int,
    ) -> Tensor:  # fmt: skip
        main = torch.cuda.current_stream()
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._read[side])
            held = self._copy(tensors, load, self._buffers[side])
            self._copied[side].record()
        batch = _Load(held, [program.keys(masks[i], start) for i, start, _ in load], kernel.chunk, self.device)
        rows = scalars if len(scalars) == 1 else scalars[[i for i, _, _ in load]]
        batch.set(held, rows)
        main.wait_event(self._copied[side])
        bad = kernel(batch)
        self._read[side].record(main)
        return bad

    def _copy(
        self, tensors: Sequence[Sequence[Tensor]], load: list[tuple[int, int, int]], buffer: Tensor
    ) -> list[list[Tensor]]:
        held, at = [], 0
        for number, start, count in load:
            out, *arguments = tensors[number]
            placed = [out.view(-1)[start : start + count]]
            for argument in arguments:
                size = count * argument.element_size()
                there = buffer[at : at + size].view(argument.dtype)
                there.copy_(argument.view(-1)[start : start + count], non_blocking=True)
                placed.append(there)
                at = -(-(at + size) // _ALIGN) * _ALIGN
            held.append(placed)
        return held


class _Load(Launch):
    """The spans of one buffer."""

    def __init__(self, held: Sequence[Sequence[Tensor]], keys: list[list[int]], chunk: int, device: torch.device):
        empty = Program()
        super().__init__([one[0].numel() for one in held], [()] * len(held), empty, chunk, device)
        self.keys = torch.tensor(keys, dtype=torch.int32, device=device)


def by_tensor(bad: Tensor, owners: Tensor, count: int) -> Tensor:
    """Flags of spans as flags of tensors."""
    if len(bad) == count:
        return bad
    return torch.zeros(count, dtype=torch.int32, device=bad.device).index_add_(
        0, owners.to(bad.device), bad.int()
    ).bool()  # fmt: skip
