"""Random numbers that depend on what they are for and on nothing else.

`uniform(key, shape)` gives the same bits on every device, in any blocking and in any order of work: element i of a
tensor gets a hash of (key, sample, i). The hash is two keyed rounds of triple32 (Christopher Wellons, "Prospecting
for Hash Functions", 2018: bias 0.0208 over 32-bit words), 32-bit integers throughout, so that it vectorises and fuses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STRIDE = 2**31


class MaskKey(NamedTuple):
    """Two 32-bit words that name one stream of random numbers: one model's one tensor under one recipe's seed."""

    first: int
    second: int


def mask_key(seed: int, model: str, tensor: str) -> MaskKey:
    """The key for one tensor of one model: BLAKE2b of the three, so that no two streams are related."""
    return _words("mask", seed, model, tensor)


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
    pieces = [_piece(key, sample, at, count, device) for at, count in _pieces(start, math.prod(shape))]
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat.reshape(tuple(shape))


def hash32(index: Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """Two keyed rounds of triple32 over int32 `index` (any shape); the keys are signed 32-bit ints or 0-d int32."""
    return _triple32(_triple32(index ^ first) ^ second)


def to_unit(bits: Tensor) -> Tensor:
    """The top 24 bits of int32 words as float32 in [0, 1)."""
    return _shift(bits, 8).to(torch.float32) * 2.0**-24


def stream(key: MaskKey, sample: int, block: int) -> tuple[int, int]:
    """The two signed words that key the hash for one sample and one block of 2^31 elements."""
    words = _words("stream", key.first, key.second, sample, block)
    return _signed(words.first), _signed(words.second)


def _piece(key: MaskKey, sample: int, at: int, count: int, device: torch.device | str | None) -> Tensor:
    block, offset = divmod(at, _STRIDE)
    index = torch.arange(offset, offset + count, dtype=torch.int32, device=device)
    return to_unit(hash32(index, *stream(key, sample, block)))


def _pieces(start: int, count: int) -> Iterator[tuple[int, int]]:
    end = start + count
    while True:
        stop = min(end, (start // _STRIDE + 1) * _STRIDE)
        yield start, stop - start
        start = stop
        if start >= end:
            return


def _words(*parts: object) -> MaskKey:
    text = "\x00".join(str(p) for p in parts).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return MaskKey(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def _triple32(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 17)) * _signed(0xED5AD4BB)
    x = (x ^ _shift(x, 11)) * _signed(0xAC4C1B51)
    x = (x ^ _shift(x, 15)) * _signed(0x31848BAB)
    return x ^ _shift(x, 14)


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int32 arithmetically; the mask makes it logical
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
