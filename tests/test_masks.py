"""The mask generator: against numpy's uint32, in any blocking, and its statistics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mergesearch.methods import mask_key, masks, uniform

KEY = mask_key(0, "code", "model.layers.0.mlp.up_proj.weight")

FIXED_KEY = (1225850071, 2819118261)
FIXED_BITS = [16251710, 7269521, 7370211, 12887312]


def lowbias32(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def reference(key, start, n, sample=0):
    """The definition in unsigned arithmetic: window = i >> 31, hash the rest with the window's stream words."""
    index = np.arange(start, start + n, dtype=np.uint64)
    out = np.empty(n, dtype=np.float32)
    for window in range(start >> 31, (start + n - 1 >> 31) + 1):
        here = index >> np.uint64(31) == window
        first, second = (np.uint32(word & 0xFFFFFFFF) for word in masks.stream(key, sample, window))
        low = (index[here] & np.uint64(0x7FFFFFFF)).astype(np.uint32)
        bits = lowbias32(lowbias32(low ^ first) ^ second)
        out[here] = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return out


@pytest.mark.parametrize("sample", [0, 3])
@pytest.mark.parametrize("start", [0, 1, 2**17 - 3, 2**31 - 500, 2**32 - 7, 5 * 2**31 + 12345])
def test_equals_numpy(start, sample):
    assert np.array_equal(
        uniform(KEY, (1000,), sample=sample, start=start).numpy(), reference(KEY, start, 1000, sample)
    )


def test_fixed_values():
    """A changed generator would change every published recipe with a random method: these are its first numbers."""
    bits = (uniform(mask_key(0, "a", "w"), (4,)) * 2**24).int().tolist()
    assert (mask_key(0, "a", "w"), bits) == (FIXED_KEY, FIXED_BITS)


@pytest.mark.parametrize("cuts", [[], [1], [7, 500], [131072, 131073], [999, 1000, 200000]])
def test_blocks_equal_the_whole(cuts):
    whole = uniform(KEY, (300, 1000))
    edges = [0, *cuts, whole.numel()]
    parts = [uniform(KEY, (b - a,), start=a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole.flatten())


def test_shapes():
    assert uniform(KEY, ()).shape == ()
    assert uniform(KEY, (0, 3)).shape == (0, 3)
    assert torch.equal(uniform(KEY, (2, 3, 4)).flatten(), uniform(KEY, (24,)))


def test_no_global_state():
    state = torch.get_rng_state()
    torch.manual_seed(1)
    one = uniform(KEY, (100,))
    torch.manual_seed(2)
    assert torch.equal(one, uniform(KEY, (100,)))
    torch.set_rng_state(state)


def test_keys_differ_in_every_part():
    keys = {mask_key(s, m, t) for s in range(5) for m in ("a", "b", "ab") for t in ("c", "bc", "")}
    assert len(keys) == 45
    assert mask_key(1, "1", "x") != mask_key(11, "", "x")


def test_range():
    u = uniform(KEY, (1 << 20,))
    assert u.min() >= 0 and u.max() < 1 and u.dtype == torch.float32
    assert torch.equal(u * 2**24, (u * 2**24).round())


def standard_score(counts: np.ndarray, total: int) -> float:
    """How many standard deviations chi-squared is from its mean."""
    expected = total / counts.size
    return (((counts - expected) ** 2 / expected).sum() - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


@pytest.mark.parametrize("model", ["a", "b", "c"])
def test_uniform(model):
    """Chi-squared over 4096 bins of a million elements, and over 64 x 64 bins of neighbours: within five deviations."""
    u = uniform(mask_key(7, model, "w"), (1 << 20,)).numpy()
    assert abs(standard_score(np.bincount((u * 4096).astype(int), minlength=4096), u.size)) < 5
    pairs = (u[:-1] * 64).astype(int) * 64 + (u[1:] * 64).astype(int)
    assert abs(standard_score(np.bincount(pairs, minlength=4096), pairs.size)) < 5


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_rows_and_columns_of_a_mask_are_binomial(density):
    """The counts kept in rows and columns have the mean and the variance of independent draws, within five errors."""
    kept = (uniform(KEY, (1024, 576)) < density).double()
    for dim in (0, 1):
        n, counts = kept.shape[dim], kept.sum(dim)
        expected = n * density * (1 - density)
        assert abs(counts.mean() - n * density) < 5 * math.sqrt(expected / len(counts))
        assert abs(counts.var() / expected - 1) < 5 * math.sqrt(2 / len(counts)) + 0.02


def test_streams_are_uncorrelated():
    """Models, tensors, seeds, samples, shifts: every correlation of a million elements is within five errors."""
    n = 1 << 20
    streams = [uniform(mask_key(0, "a", "w"), (n,), sample=s) for s in (0, 1, 2)]
    others = [(1, "a", "w"), (2, "a", "w"), (0, "b", "w"), (0, "a", "v"), (0, "aw", ""), (0, "w", "a")]
    streams += [uniform(mask_key(*parts), (n,)) for parts in others]
    streams.append(uniform(KEY, (n,), start=2**31))
    streams.append(uniform(KEY, (n,)))
    normal = [(u.double() - 0.5) * math.sqrt(12) for u in streams]
    for a, b in itertools.combinations(normal, 2):
        assert abs((a * b).mean()) < 5 / math.sqrt(n)
    for lag in (1, 2, 3, 4, 8, 16, 64, 576, 1024, 65536):
        assert abs((normal[0][:-lag] * normal[0][lag:]).mean()) < 5 / math.sqrt(n - lag)


def test_masks_of_models_overlap_as_independent_ones():
    """At density 0.5 two models keep a quarter of the elements together, three an eighth."""
    kept = [uniform(mask_key(3, m, "w"), (1 << 20,)) < 0.5 for m in "abc"]
    n = 1 << 20
    for together, p in ((kept[0] & kept[1], 0.25), (kept[0] & kept[1] & kept[2], 0.125)):
        assert abs(together.sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("start", [0, 2**31 - 500])
def test_cuda_equals_cpu(start):
    assert torch.equal(uniform(KEY, (3000,), start=start, device="cuda").cpu(), uniform(KEY, (3000,), start=start))
