"""Which residency is chosen, and that the engine keeps to what it promises about memory and rebuilding."""

from __future__ import annotations

import gc
import os

import psutil
import pytest
import torch

from mergesearch import methods
from mergesearch.engine.live import Engine
from mergesearch.engine.residency import residency
from mergesearch.recipe import Rule


@pytest.fixture
def ten_gib(monkeypatch):
    class Memory:
        available = 10 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def test_a_small_pool_is_held_whole(ten_gib):
    choice = residency(4 * 2**30, 2**30, "cpu")
    assert (choice.mode, choice.fits) == ("device", True)
    assert choice.device_bytes == pytest.approx(1.05 * 5 * 2**30)
    assert "5.2 GiB of 10.0 GiB free on cpu" in str(choice)


def test_a_pool_larger_than_memory_is_mapped(ten_gib):
    choice = residency(40 * 2**30, 2**30, "cpu")
    assert (choice.mode, choice.fits) == ("mapped", True)
    assert choice.device_bytes < 4 * 2**30


def test_a_candidate_larger_than_memory_does_not_fit(ten_gib):
    choice = residency(400 * 2**30, 100 * 2**30, "cpu")
    assert (choice.mode, choice.fits) == ("mapped", False)


def test_cuda_spills_to_pinned_memory(ten_gib, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 4 * 2**30))
    assert residency(2**30, 2**29, "cuda:0").mode == "device"
    choice = residency(6 * 2**30, 2**30, "cuda:0")
    assert (choice.mode, choice.host_bytes) == ("pinned", 6 * 2**30)
    assert residency(60 * 2**30, 2**30, "cuda:0").mode == "mapped"


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
