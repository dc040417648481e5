"""Candidates in the form that will be served: what is scored, what is exported, and that it can turn a ranking."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import TinyPool, file_tensors, fine_tune, make_model, make_pool
from torch import Tensor

from mergesearch.checkpoints import parameters
from mergesearch.engine.live import Engine
from mergesearch.engine.served import Served, check_served
from mergesearch.errors import UserError
from mergesearch.recipe import single_rule
from mergesearch.results.card import Story, lm_eval_commands, write_checkpoint

ao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
FORMS = ["int8", "int4", "fp8"]
TOKENS = torch.tensor([[3, 5, 7, 11, 13, 2, 4, 33, 21]])
# sides that a group of 32 numbers fits into
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


def pool_of(folder: Path, **more: Any) -> TinyPool:
    return make_pool(folder, models=2, **{**SIZES, **more})


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parameters(engine.model).items()}


def test_without_torchao_it_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"score_as is int8, which needs torchao: pip install 'mergesearch\[torchao\]'"):
        check_served("int8")
    check_served(None)


def test_the_card_asks_for_the_form_that_was_scored() -> None:
    story = Story("a test", {}, tasks={"quiz": None}, samples={"quiz": [1]}, served="int4")
    assert "pretrained=int4,dtype=bfloat16" in lm_eval_commands(story, "bfloat16")[0]


@ao
@pytest.mark.parametrize("form", FORMS)
def test_what_is_scored_is_what_is_exported(form: str, tmp_path: Path) -> None:
    """The live model has the numbers of the folder of that form; the checkpoint beside it is as merged."""
    from transformers import AutoModelForCausalLM

    tiny = pool_of(tmp_path)
    pool = tiny.load()
    engine, plain = Engine(pool, "float32", served=Served(form)), Engine(pool, "float32")
    recipe = tiny.recipe(*single_rule("task_arithmetic", None, weight=[0.6, 0.5]))
    engine.load(recipe)
    scored = weights(engine)
    plain.load(recipe)
    merged = weights(plain)
    layers = Served(form).layers(engine.model)
    assert len(layers) == 2 * 7 and "lm_head.weight" not in layers
    for name, tensor in scored.items():
        assert torch.equal(tensor, merged[name]) == (name not in layers), name
    out = write_checkpoint(recipe, engine, tmp_path / "out", Story("a test", {}))
    assert all(torch.equal(merged[name], tensor) for name, tensor in file_tensors(out).items())
    there = dict(AutoModelForCausalLM.from_pretrained(out / form, dtype=torch.float32).named_parameters())
    for name, tensor in scored.items():
        held = there[name].dequantize() if name in layers else there[name]
        assert torch.equal(held, tensor), name
    # and the engine goes on in that form
    engine.load(recipe)
    assert all(torch.equal(tensor, scored[name]) for name, tensor in weights(engine).items())


@ao
@pytest.mark.parametrize("form", FORMS)
def test_candidates_are_as_if_each_were_the_first(form: str, tmp_path: Path) -> None:
    """Whatever was loaded before, stacks among them; and no parent is written to."""
    tiny = pool_of(tmp_path)
    pool = tiny.load()
    parents = {n: {k: t.clone() for k, t in m.live.items()} for n, m in {**pool.models, "base": pool.base}.items()}
    engine = Engine(pool, "float32", served=Served(form))
    recipes = [
        tiny.recipe(*single_rule("linear", None, weight=[0.6, 0.5])),
        tiny.recipe(*single_rule("passthrough", None), stack=({"a": (0, 1)}, {"b": (0, 0)})),
        tiny.recipe(*single_rule("ties", None, density=0.5)),
    ]
    for recipe in (*recipes, *reversed(recipes)):
        engine.load(recipe)
        fresh = Engine(pool, "float32", served=Served(form))
        fresh.load(recipe)
        assert all(torch.equal(tensor, weights(fresh)[name]) for name, tensor in weights(engine).items())
    for name, held in parents.items():
        now = (pool.base if name == "base" else pool.models[name]).live
        assert all(torch.equal(now[key], tensor) for key, tensor in held.items())


def outlier(name: str, model: torch.nn.Module) -> None:
    """Model a is what is wanted, but for large weights behind a unit that is always silent: they change nothing, and
    take the scale of all numbers that share one with them. Model b is model a without them, a little off everywhere."""
    with torch.no_grad():
        if name == "b":
            wanted = fine_tune(make_model("llama", **SIZES), 1)
            generator = torch.Generator().manual_seed(0)
            for parameter, own in zip(model.parameters(), wanted.parameters(), strict=True):
                parameter.copy_(own + 0.003 * torch.randn(own.shape, generator=generator))
        for number in range(2):
            mlp = model.model.layers[number].mlp
            mlp.up_proj.weight[0] = 0.0
            if name == "a":
                mlp.down_proj.weight[:, 0] = 60.0


@ao
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_ranking_of_two_merges_changes(form: str, tmp_path: Path) -> None:
    """Which of two merges is nearer to what is wanted is not the same as merged and as served."""
    tiny = pool_of(tmp_path, edit=outlier)
    pool = tiny.load(allow_unrelated=True)
    engine, plain = Engine(pool, "float32", served=Served(form)), Engine(pool, "float32")
    near = tiny.recipe(*single_rule("task_arithmetic", None, weight=[1.0, 0.0]))
    off = tiny.recipe(*single_rule("task_arithmetic", None, weight=[0.0, 1.0]))
    plain.load(near)
    with torch.no_grad():
        answers = plain.model(TOKENS).logits.log_softmax(-1)

    def score(made: Engine, recipe: Any) -> float:
        made.load(recipe)
        with torch.no_grad():
            logprobs = made.model(TOKENS).logits.log_softmax(-1)
        return -float((answers.exp() * (answers - logprobs)).sum(-1).mean())

    assert score(plain, near) > score(plain, off)
    assert score(engine, near) < score(engine, off)
