"""Order statistics that are exact for every rank, from tables kept between candidates.

Where few values occur (task vectors of bf16 checkpoints are small multiples of powers of two) the table holds them all,
and a new rank costs a binary search. Where nearly all differ it holds a histogram over the leading bits, and a new rank
costs one more pass over the tensor, for the values that share the leading bits of the one that is looked for; what that
pass finds is kept for the next rank that falls there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mergesearch.engine.kernels import orders

Blocks = Callable[[], Iterator[Tensor]]

# leading bits that a histogram tells apart: sign, 8 exponent bits and 7 to 8 of the mantissa (float32)
_BINS = 2**17
_CHUNK = 2**20


class Table:
    """The sorted multiset of a tensor's values, compressed.

    Args:
        blocks: gives the values block by block, flat, the same each time; float32 or float64.
        count: how many there are.
    """

    def __init__(self, blocks: Blocks, count: int):
        self.count = count
        self._fine: dict[int, Tensor] = {}
        most = max(2**14, count // 128)
        self._values, self._ends = _distinct(blocks(), most)
        if self._values is None:
            self._bins, self._ends = _histogram(blocks())

    @property
    def nbytes(self) -> int:
        held = [self._ends, *self._fine.values(), self._bins if self._values is None else self._values]
        return sum(t.numel() * t.element_size() for t in held)

    def smallest(self, k: int, blocks: Blocks) -> Tensor:
        """The k-th smallest value, k from 1 on, 0-d: what `torch.kthvalue` gives."""
        if not 1 <= k <= self.count:
            raise ValueError(f"there is no {k}-th smallest of {self.count} values")
        place = int(torch.searchsorted(self._ends, k))
        if self._values is not None:
            return self._values[place].clone()
        before = int(self._ends[place - 1]) if place else 0
        values = self._fine.get(place)
        if values is None:
            values = self._fine[place] = _within(blocks(), int(self._bins[place]))
            while len(self._fine) > 1 and sum(t.numel() for t in self._fine.values()) > self.count // 64:
                self._fine.pop(next(iter(self._fine)))
        return values[k - before - 1].clone()


def _distinct(blocks: Iterator[Tensor], most: int) -> tuple[Tensor | None, Tensor]:
    """The values that occur, in order, with how many are no larger; None where there are more than `most`."""
    first = next(blocks)
    blocks = itertools.chain([first], blocks)
    if orders.here(first):
        counts = orders.Counts(most)
        return counts.sorted() if all(counts.add(block) for block in blocks) else (None, torch.empty(0))
    return _distinct_sorted(blocks, most)


def _distinct_sorted(blocks: Iterator[Tensor], most: int) -> tuple[Tensor | None, Tensor]:
    values, counts = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for number, block in enumerate(_chunks(blocks)):
        here, times = torch.unique(block + 0.0, return_counts=True)  # -0 becomes 0
        if number:
            here, order = torch.sort(torch.cat([values, here]))
            times = torch.cat([counts, times])[order]
            here, where = torch.unique_consecutive(here, return_inverse=True)
            times = torch.zeros(len(here), dtype=torch.int64, device=here.device).index_add_(0, where, times)
        if len(here) > most:
            return None, torch.empty(0)
        values, counts = here, times
    # what unique gives is a small part of memory for all elements
    return values.clone(), counts.cumsum(0)


def _chunks(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Blocks put together to about 2^20 elements: a sort of many costs less than a merge of many."""
    held: list[Tensor] = []
    for block in blocks:
        held.append(block)
        if sum(b.numel() for b in held) >= _CHUNK:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def sort(values: Tensor) -> Tensor:
    """Sorted values; on the CPU by numpy, whose sort of floats uses vector instructions."""
    if values.device.type != "cpu":
        return values.sort().values
    import numpy as np

    return torch.from_numpy(np.sort(values.numpy()))


def _key(values: Tensor) -> Tensor:
    """The leading bits as an int32 from 0 that has the order of the values."""
    whole, shift = (torch.int32, 15) if values.dtype == torch.float32 else (torch.int64, 47)
    bits = (values + 0.0).view(whole)  # -0 becomes 0
    mask = torch.iinfo(whole).max
    ordered = torch.where(bits < 0, bits ^ mask, bits)
    return (ordered >> shift).to(torch.int32) + _BINS // 2


def _histogram(blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The bins that occur, in order, and how many values lie in them or below."""
    counts: Tensor | None = None
    for block in blocks:
        times = _count(_key(block))
        counts = times if counts is None else counts.add_(times)
    assert counts is not None
    bins = counts.nonzero().flatten()
    return bins.to(torch.int32), counts[bins].cumsum(0)


def _count(keys: Tensor) -> Tensor:
    if keys.device.type == "cpu":
        return torch.bincount(keys, minlength=_BINS)
    # bincount keeps a copy of all bins for each of its thousands of thread blocks
    return torch.zeros(_BINS, dtype=torch.int64, device=keys.device).index_add_(
        0, keys, torch.ones((), dtype=torch.int64, device=keys.device).expand(len(keys))
    )  # fmt: skip


def _within(blocks: Iterator[Tensor], number: int) -> Tensor:
    return sort(torch.cat([block[_key(block) == number] for block in blocks]))
