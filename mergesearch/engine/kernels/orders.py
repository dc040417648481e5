"""Counting and ranking on the CPU in C++: what sorting whole tensors would take minutes for.

Each equals what torch gives, to the last bit; where there is no compiler torch is used.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mergesearch.engine.kernels import native
from mergesearch.engine.kernels.notices import Unavailable, once, without_kernels

log: logging.Logger = logging.getLogger(__name__)

_SOURCE = """
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// open addressing; a slot is empty where its count is 0. Returns false once more than `most` values occur.
extern "C" int64_t count_values(const uint32_t* values, int64_t n, uint32_t* keys, int64_t* counts, int64_t slots,
                                int64_t used, int64_t most) {
    const uint64_t mask = slots - 1;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = values[i] == 0x80000000u ? 0 : values[i];
        uint64_t at = (uint32_t)(key * 2654435769u) >> 7;
        for (at = (at ^ (key >> 3)) & mask; counts[at] && keys[at] != key; at = (at + 1) & mask) {}
        if (!counts[at]) {
            keys[at] = key;
            if (++used > most) return -1;
        }
        counts[at]++;
    }
    return used;
}

static void sort_by_digits(uint64_t* items, uint64_t* spare, int64_t n) {
    for (int shift = 32; shift < 64; shift += 11) {
        int64_t starts[2049] = {0};
        for (int64_t i = 0; i < n; i++) starts[((items[i] >> shift) & 2047) + 1]++;
        if (starts[((items[0] >> shift) & 2047) + 1] == n) continue;
        for (int i = 0; i < 2048; i++) starts[i + 1] += starts[i];
        for (int64_t i = 0; i < n; i++) spare[starts[(items[i] >> shift) & 2047]++] = items[i];
        std::swap_ranges(items, items + n, spare);
    }
}

// for each row the first plus the last rank, from 0, among the equal magnitudes
template <typename T> static void ranks(const uint32_t* values, int64_t rows, int64_t columns, T* out) {
    std::vector<uint64_t> items(columns), spare(columns);
    for (int64_t r = 0; r < rows; r++, values += columns, out += columns) {
        for (int64_t i = 0; i < columns; i++) items[i] = (uint64_t)(values[i] & 0x7fffffffu) << 32 | (uint64_t)i;
        if (columns < 256) std::sort(items.begin(), items.end());
        else sort_by_digits(items.data(), spare.data(), columns);
        for (int64_t i = 0, j; i < columns; i = j) {
            for (j = i + 1; j < columns && items[j] >> 32 == items[i] >> 32; j++) {}
            for (int64_t at = i; at < j; at++) out[(uint32_t)items[at]] = (T)(i + j - 1);
        }
    }
}

extern "C" void ranks16(const uint32_t* v, int64_t rows, int64_t columns, int16_t* out) {
    ranks(v, rows, columns, out);
}
extern "C" void ranks32(const uint32_t* v, int64_t rows, int64_t columns, int32_t* out) {
    ranks(v, rows, columns, out);
}
"""


class Counts:
    """Which float32 values occur how often, as long as they are no more than `most`."""

    def __init__(self, most: int):
        self.most = most
        self.used: int = 0
        slots = 1 << max(10, (2 * most - 1).bit_length())
        self.keys: Tensor = torch.zeros(slots, dtype=torch.int32)
        self.counts: Tensor = torch.zeros(slots, dtype=torch.int64)

    def add(self, values: Tensor) -> bool:
        """Whether the values, flat and contiguous, still fit."""
        self.used = _function("count_values")(
            values.data_ptr(), values.numel(), self.keys.data_ptr(), self.counts.data_ptr(), len(self.keys),
            self.used, self.most,
        )  # fmt: skip
        return self.used >= 0

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The values in order, and how many are no larger."""
        there = self.counts.nonzero().flatten()
        values, order = self.keys[there].view(torch.float32).sort()
        return values, self.counts[there][order].cumsum(0)


def rank_sums(d: Tensor) -> Tensor:
    """As `mergesearch.methods.sparse.rank_sums`, for float32 on the CPU."""
    d = d.contiguous()
    narrow = 2 * d.shape[-1] < 2**15
    out = torch.empty(d.shape, dtype=torch.int16 if narrow else torch.int32)
    rank = _function("ranks16" if narrow else "ranks32")
    rank(d.data_ptr(), d.numel() // d.shape[-1], d.shape[-1], out.data_ptr())
    return out


def here(tensor: Tensor) -> bool:
    """Whether there is a way faster than torch's for a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _built() is not None


@cache
def _function(name: str) -> Any:
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    arguments = {"count_values": [pointer, word, pointer, pointer, word, word, word]}
    result = word if name == "count_values" else None
    return native.function(_SOURCE, name, arguments.get(name, [pointer, word, word, pointer]), result)


@cache
def _built() -> Any:
    try:
        return _function("count_values")
    except Unavailable as reason:
        without_kernels(log, reason)
    except (RuntimeError, OSError) as error:
        once(log, f"ranking and counting without compiled code: {' '.join(str(error).split())[:200]}")
    return None
