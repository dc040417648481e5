"""Random numbers that depend on what they are for and on nothing else.

`uniform(key, shape)` gives the same bits on every device, in any blocking and in any order of work: element i of a
tensor gets a hash of (key, sample, i). The hash is two keyed rounds of lowbias32 (Wellons, "Prospecting for hash
functions", 2018), 32-bit integers throughout, so that it vectorises and fuses: one round fails a chi-squared test over
256 bins of 2^21 consecutive elements, two pass it, pairs of neighbours, rows, columns and neighbouring keys too, like
two rounds of the slower triple32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergesearch.methods.listening import statistic

# elements that share one pair of stream words: an int32 index reaches no further
_WINDOW = 2**31
# eager torch is fastest where a block's temporaries stay in the cache
_CPU_BLOCK = 2**17
_DEVICE_BLOCK = 2**26


class MaskKey(NamedTuple):
    """Two 32-bit words that name one stream of random numbers: one model's one tensor under one recipe's seed."""

    first: int
    second: int


def mask_key(seed: int, model: str, tensor: str) -> MaskKey:
    """The key for one tensor of one model: BLAKE2b of the three, so that no two streams are related."""
    return _words("mask", seed, model, tensor)


@statistic(how="uniform", per_element=True)
def uniform(
    key: MaskKey,
    shape: Sequence[int],
    sample: int = 0,
    device: torch.device | str | None = None,
    start: int = 0,
) -> Tensor:
    """Uniform float32 numbers in [0, 1), multiples of 2^-24, one for each element of `shape`.

    `start` is the flat index of the first element within the whole tensor, so blocks of a tensor equal the whole;
    `sample` counts independent draws for the same tensor.
    """
    n = math.prod(shape)
    out = torch.empty(n, dtype=torch.float32, device=device)
    size = _CPU_BLOCK if out.device.type == "cpu" else _DEVICE_BLOCK
    for at, stop in _blocks(start, start + n, size):
        out[at - start : stop - start] = _block(key, sample, at, stop, out.device)
    return out.reshape(tuple(shape))


def hash32(index: Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """Two keyed rounds of lowbias32 over int32 `index` (any shape); the keys are signed 32-bit ints or 0-d int32."""
    return _lowbias32(_lowbias32(index ^ first) ^ second)


def to_unit(bits: Tensor) -> Tensor:
    """The top 24 bits of int32 words as float32 in [0, 1)."""
    return _shift(bits, 8).to(torch.float32) * 2.0**-24


def stream(key: MaskKey, sample: int, window: int) -> tuple[int, int]:
    """The two signed words that key the hash for one sample and one window of 2^31 elements (0: the first)."""
    words = _words("stream", key.first, key.second, sample, window)
    return _signed(words.first), _signed(words.second)


def _block(key: MaskKey, sample: int, at: int, stop: int, device: torch.device) -> Tensor:
    window, offset = divmod(at, _WINDOW)
    index = torch.arange(offset, offset + stop - at, dtype=torch.int32, device=device)
    return to_unit(hash32(index, *stream(key, sample, window)))


def _blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    # cut at multiples of the size, which divides the window, so that no block lies in two windows
    while start < end:
        stop = min(end, (start // size + 1) * size)
        yield start, stop
        start = stop


def _words(*parts: object) -> MaskKey:
    text = "\x00".join(str(p) for p in parts).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return MaskKey(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def _lowbias32(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 16)) * _signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int32 arithmetically; the mask makes it logical
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
