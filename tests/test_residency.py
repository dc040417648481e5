"""Which residency is chosen, and that the engine keeps to what it promises about memory and rebuilding."""

from __future__ import annotations

import gc
import os

import psutil
import pytest
import torch
from support.tiny_models import make_model

from mergesearch import methods
from mergesearch.commands.holding import held
from mergesearch.engine import kernels
from mergesearch.engine import residency as residencies
from mergesearch.engine.kernels import WORKING
from mergesearch.engine.live import Engine
from mergesearch.engine.residency import Needs, residency
from mergesearch.errors import UserError
from mergesearch.recipe import Rule

GIB = 2**30


@pytest.fixture
def ten_gib(monkeypatch):
    class Memory:
        available = 10 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def gpus(monkeypatch, *gib: float) -> None:
    """CUDA devices with so much free memory each, as far as anybody asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gib))
    free = {f"cuda:{number}": int(size * GIB) for number, size in enumerate(gib)} | {"cuda": int(gib[0] * GIB)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[str(device)], 80 * GIB))


def test_a_small_pool_is_held_whole(ten_gib):
    choice = residency(Needs(4 * GIB, GIB), "cpu")
    assert (choice.mode, choice.fits, choice.possible) == ("device", True, True)
    assert choice.device_bytes == pytest.approx(1.05 * 5 * GIB)
    assert "5.2 GiB of 10.0 GiB free on cpu" in str(choice)
    assert choice.kept == pytest.approx((9.5 - 5.25) * GIB / 4, rel=1e-6)


def test_a_pool_larger_than_memory_is_mapped(ten_gib):
    choice = residency(Needs(40 * GIB, GIB, made=GIB), "cpu")
    assert (choice.mode, choice.fits) == ("mapped", True)
    assert choice.device_bytes == pytest.approx(2 * GIB + 0.05 * 41 * GIB)
    forced = residency(Needs(40 * GIB, GIB), "cpu", "device")
    assert (forced.mode, forced.fits, forced.possible) == ("device", False, False)
    assert residency(Needs(GIB, GIB), "cpu", "mapped").mode == "mapped"


def test_a_candidate_larger_than_memory_does_not_fit(ten_gib):
    choice = residency(Needs(400 * GIB, 100 * GIB), "cpu")
    assert (choice.mode, choice.fits, choice.possible) == ("mapped", False, False)
    with pytest.raises(
        UserError, match=r"does not fit into memory: parents read from their files.* of 10.0 GiB free on cpu"
    ):
        held(choice)


def test_scorings_share_counts(ten_gib):
    """As many requests at once as there is room for, 8 at least beside a whole pool; or as many as asked."""
    small = residency(Needs(4 * GIB, GIB, row=GIB // 64), "cpu")
    assert (small.mode, small.rows, small.scoring) == ("device", 64, GIB)
    assert "(1.0 GiB for scoring)" in str(small)
    large = residency(Needs(4 * GIB, GIB, row=GIB // 4), "cpu")
    assert (large.mode, large.rows, large.scoring) == ("device", 16, 4 * GIB) and large.fits
    assert residency(Needs(4 * GIB, GIB, row=GIB), "cpu").mode == "mapped"
    asked = residency(Needs(4 * GIB, GIB, row=GIB // 4, rows=24), "cpu")
    assert (asked.mode, asked.rows, asked.scoring) == ("mapped", 24, 6 * GIB)
    assert residency(Needs(4 * GIB, GIB, row=GIB // 64, scoring=3 * GIB), "cpu").scoring == 3 * GIB
    beyond = residency(Needs(GIB, GIB, row=100 * GIB), "cpu")
    assert (beyond.rows, beyond.fits, beyond.possible) == (1, False, True)


def test_cuda_spills_to_pinned_memory(ten_gib, monkeypatch):
    gpus(monkeypatch, 5)
    assert residency(Needs(GIB, GIB // 2), "cuda:0").mode == "device"
    choice = residency(Needs(6 * GIB, GIB, pinned=7 * GIB), "cuda:0")
    assert (choice.mode, choice.host_bytes) == ("pinned", 7 * GIB)
    assert choice.device_bytes == GIB + Needs(6 * GIB, GIB).overhead + WORKING
    assert residency(Needs(60 * GIB, GIB), "cuda:0").mode == "mapped"
    assert residency(Needs(GIB, GIB // 2), "cuda:0", "mapped").mode == "mapped"
    with pytest.raises(UserError, match="memory is 'pinned', which holds parents beside a GPU"):
        residency(Needs(GIB, GIB), "cpu", "pinned")


def test_a_candidate_that_fits_no_single_gpu_is_split(ten_gib, monkeypatch):
    blank = make_model(num_hidden_layers=8).to("meta")
    size = sum(tensor.nbytes for tensor in blank.parameters())
    monkeypatch.setattr(kernels, "WORKING", 0)
    monkeypatch.setattr(residencies, "SHARE", 1.0)

    def free(*parts: float) -> None:
        gpus(monkeypatch, *(part * size / GIB for part in parts))

    free(1.6, 1.6, 1.6, 1.6)
    alone = Needs(2 * size, size, blank=blank)
    assert not residency(alone, "auto").devices.parts  # it fits one of them, and its parents go to the host
    free(0.7, 0.7, 0.7, 0.7)
    choice = residency(alone, "auto")
    assert choice.mode == "pinned" and len(set(choice.devices.parts.values())) == 2
    assert "on cuda:0 and cuda:1, split between them" in str(choice)
    free(2.2, 2.2, 2.2)
    within = residency(Needs(2 * size, size, row=size, rows=1, blank=blank), "auto")
    assert within.mode == "device" and len(within.devices.every) == 2 and within.fits
    free(0.7, 0.7, 0.7, 0.7)
    forced = residency(alone, "auto", "device")
    assert forced.mode == "device" and not forced.possible  # as it was asked for, and refused
    # room is kept for as many requests at once as were asked for
    asked = residency(Needs(2 * size, size, row=size // 60, rows=18, blank=blank), "auto")
    assert len(asked.devices.every) == 3 > len(choice.devices.every)
    named = residency(alone, "cuda:0")
    assert not named.devices.parts
    free(0.2, 0.2)
    assert not residency(alone, "auto").possible


def test_only_what_changed_is_rebuilt(tiny_pool, monkeypatch):
    tiny = tiny_pool("llama")
    engine = Engine(tiny.load(), "float32")
    made = []
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda r, tasks: (made.extend(t.label for t in tasks), run(r, tasks))[1])

    def load(weight: float, seed: int = 0) -> set[str]:
        made.clear()
        rules = (
            Rule(layers=(0, 0), components=("mlp",), method="linear", parameters={"weight": [weight, 1.0]}),
            Rule(components=("norm",), method="dare_linear", parameters={"density": 0.5}),
            Rule(method="linear"),
        )
        recipe = tiny.recipe(*rules, seed=seed)
        engine.load(recipe)
        fresh = Engine(tiny.load(), "float32")
        fresh.load(recipe)
        other = fresh.model.state_dict()
        assert all(torch.equal(other[name], tensor) for name, tensor in engine.model.state_dict().items())
        return set(made)

    everything = load(0.5)
    mlp = {name for name in everything if "layers.0.mlp" in name}
    assert mlp and len(everything) == len(engine.pool.infos)
    assert load(0.5) == set()
    assert load(0.7) == mlp
    assert load(0.7, seed=1) == {name for name in everything if "norm" in name}
    with torch.no_grad():
        engine.model.get_input_embeddings().weight.add_(1.0)
    assert load(0.7, seed=1) == {"model.embed_tokens.weight"}


def test_three_hundred_candidates_take_no_more_memory(tiny_pool):
    """Every method in turn, new parameters each time: the process is as large after 300 candidates as after 60."""
    tiny = tiny_pool("llama", dtype="bfloat16")
    engine = Engine(tiny.load(), "bfloat16")
    engine.runner.statistics.small.limit = 2**18
    names = [n for n in methods.names() if n not in ("passthrough",)]
    process, sizes = psutil.Process(os.getpid()), {}
    for number in range(300):
        method = methods.get(names[number % len(names)])
        given = {
            k: p.search[0] + (p.search[1] - p.search[0]) * (number % 97) / 97
            for k, p in method.parameters.items()
            if p.search
        }
        given = {k: max(v, 0.01) for k, v in given.items()}
        engine.load(tiny.recipe(Rule(method=method.name, parameters=given), seed=number, out_dtype="bfloat16"))
        if number in (99, 299):
            gc.collect()
            sizes[number] = process.memory_info().rss
    assert sizes[299] - sizes[99] < 30 * 2**20
    assert engine.runner.statistics.small.nbytes <= 2**18
