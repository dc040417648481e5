"""The merge engine: a recipe and a pool become the live model's weights, the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.tiny_models import TinyPool, file_tensors, make_pool, same_bits

from mergesearch import methods
from mergesearch.checkpoints import Pool, floating_tensors
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import DTYPES, check, plan
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Recipe, Rule, read
from mergesearch.results.card import Story, write_checkpoint

STORY = Story("a test", {"python": "3.11", "mergesearch": "0.1"})
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyPool, Pool]:
    written = make_pool(tmp_path_factory.mktemp("pool"), models=3, dtype="bfloat16")
    return written, written.load()


def candidate(pool: Pool, recipe: Recipe) -> dict[str, torch.Tensor]:
    engine = Engine(pool, recipe.out_dtype)
    engine.load(recipe)
    return {name: tensor.clone() for name, tensor in floating_tensors(engine.model).items()}


def rules() -> tuple[Rule, ...]:
    return (
        Rule(layers=(0, 0), method="dare_ties", parameters={"density": 0.5, "weight": {"a": 0.5, "c": -0.3}}),
        Rule(components=("embedding", "head"), method="slerp", models=("b", "a"), parameters={"t": 0.25}),
        Rule(method="della", parameters={"density": 0.6}),
    )


def test_the_live_model_begins_as_the_base(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    for dtype in DTYPES:
        live = floating_tensors(Engine(pool, dtype).model)
        assert all(same_bits(live[name], t.to(DTYPES[dtype])) for name, t in file_tensors(written.base).items())


def test_each_tensor_is_the_methods_result_rounded_once(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    recipe = written.recipe(*rules(), out_dtype="bfloat16", seed=3)
    found = candidate(pool, recipe)
    files = {name: file_tensors(folder) for name, folder in {"base": written.base, **written.models}.items()}
    for info, step in zip(pool.infos, [recipe.rule_for(i) for i in pool.infos], strict=True):
        names = step.models or tuple(recipe.models)
        method = methods.get(step.method)
        keys = [methods.mask_key(3, name, info.name) for name in names] if method.random else None
        parameters = method.complete(step.parameters, names, "a test")
        merged = method(
            files["base"][info.name].float(), [files[n][info.name].float() for n in names], parameters, keys
        )
        assert same_bits(found[info.name], merged.to(torch.bfloat16)), info.name


def test_the_same_recipe_gives_the_same_bytes(parents: tuple[TinyPool, Pool]) -> None:
    """On another pool, after other candidates, under other global seeds: law 1."""
    written, pool = parents
    recipe = written.recipe(*rules(), out_dtype="bfloat16", seed=11)
    first = candidate(pool, recipe)
    engine = Engine(written.load(), "bfloat16")
    for other in (written.recipe(out_dtype="bfloat16"), written.recipe(*rules(), out_dtype="bfloat16", seed=12)):
        torch.manual_seed(99)
        engine.load(other)
    assert not all(same_bits(first[n], t) for n, t in floating_tensors(engine.model).items())
    torch.manual_seed(1234)
    engine.load(recipe)
    assert all(same_bits(first[n], t) for n, t in floating_tensors(engine.model).items())


def test_the_global_generator_is_left_alone(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    engine = Engine(pool, "float32")
    before = torch.get_rng_state()
    engine.load(written.recipe(*rules()))
    assert torch.equal(before, torch.get_rng_state())


def test_parents_are_never_written_to(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    for dtype in DTYPES:
        engine = Engine(pool, dtype)
        engine.load(written.recipe(*rules(), out_dtype=dtype))
        engine.load(written.recipe(Rule(method="passthrough", models=("a",)), out_dtype=dtype))
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.zero_()
    for name in ("base", "a", "b", "c"):
        folder = written.base if name == "base" else written.models[name]
        assert all(same_bits(pool.parent(name).tensors[n], t) for n, t in file_tensors(folder).items())


def test_a_recipe_without_base(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    recipe = Recipe(models=written.models, rules=(Rule(method="linear"),), out_dtype="float32")
    assert all(same_bits(t, candidate(pool, written.recipe())[n]) for n, t in candidate(pool, recipe).items())
    needs = Recipe(models=written.models, rules=(Rule(method="ties"),), out_dtype="float32")
    with pytest.raises(UserError, match=r"ties in rules.0 needs a base model"):
        check(needs)


def test_the_plan_says_who_makes_what(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    jobs = {job.info.name: job for job in plan(written.recipe(*rules()), pool)}
    assert list(jobs) == [info.name for info in pool.infos]
    assert jobs[WEIGHT].step.method.name == "dare_ties"
    assert jobs[WEIGHT].step.parameters["weight"] == [0.5, 1.0, -0.3]
    assert jobs["lm_head.weight"].step.models == ("b", "a")
    assert jobs[WEIGHT].base == WEIGHT and jobs[WEIGHT].parents == (WEIGHT,) * 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rules": (Rule(method="tise"),)}, r"unknown merge method 'tise' in rules.0: did you mean 'ties'"),
        (
            {"rules": (Rule(method="ties", parameters={"desnity": 1}),)},
            r"unknown parameter of ties 'desnity' in rules.0",
        ),
        (
            {"rules": (Rule(method="ties", parameters={"density": 0.0}),)},
            r"density 0.0 in rules.0 \(a\) is not allowed",
        ),
        ({"rules": (Rule(components=("mlp",), method="linear"),)}, r"no rule of recipe \w+ covers tensor 'model.embed"),
        ({"out_dtype": "float16"}, r"has out_dtype float16, the live model is float32"),
        ({"tokenizer": "a"}, r"has tokenizer 'a', the models were aligned to 'base'"),
    ],
)
def test_recipes_that_do_not_fit(change: dict[str, Any], said: str, parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    engine = Engine(pool, "float32")
    before = {n: t.clone() for n, t in floating_tensors(engine.model).items()}
    with pytest.raises(UserError, match=said):
        engine.load(written.recipe().model_copy(update=change))
    assert all(same_bits(before[n], t) for n, t in floating_tensors(engine.model).items())


def test_a_model_that_the_pool_lacks(parents: tuple[TinyPool, Pool]) -> None:
    written, pool = parents
    recipe = Recipe(base=written.base, models={**written.models, "z": "z"}, rules=(Rule(method="linear"),))
    with pytest.raises(UserError, match=r"names model 'z', not among the pool's a, b, c"):
        plan(recipe, pool)


def test_a_candidate_that_overflows_does_not_end_the_engine(tmp_path: Path) -> None:
    written = make_pool(tmp_path, dtype="float16")
    engine = Engine(written.load(), "float16")
    huge = Rule(components=("mlp",), method="passthrough", models=("a",), parameters={"scale": 1e30})
    fine = Rule(method="linear")
    with pytest.raises(
        CandidateError, match=r"passthrough made NaN or infinity in model.layers.0.mlp.gate_proj.weight"
    ):
        engine.load(written.recipe(huge, fine, out_dtype="float16"))
    engine.load(written.recipe(fine, out_dtype="float16"))
    fresh = Engine(written.load(), "float16")
    fresh.load(written.recipe(fine, out_dtype="float16"))
    ours, theirs = floating_tensors(engine.model), floating_tensors(fresh.model)
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_a_failure_inside_a_stack_does_not_end_the_engine(tmp_path: Path) -> None:
    written = make_pool(tmp_path, dtype="float16")
    engine = Engine(written.load(), "float16")
    scaled = Rule(method="passthrough", parameters={"scale": 1e30})
    with pytest.raises(CandidateError):
        engine.load(written.recipe(scaled, stack=({"a": (0, 1)}, {"b": (0, 1)}), out_dtype="float16"))
    recipe = written.recipe(Rule(method="passthrough"), stack=({"a": (0, 1)}, {"b": (0, 1)}), out_dtype="float16")
    engine.load(recipe)
    fresh = Engine(written.load(), "float16")
    fresh.load(recipe)
    ours, theirs = floating_tensors(engine.model), floating_tensors(fresh.model)
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_tensors_that_the_architecture_keeps_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are float32 in the candidate as they are when the export is loaded."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {"norm"})
    assert LlamaForCausalLM._keep_in_fp32_modules_strict == {"norm"}
    written = make_pool(tmp_path, dtype="float32")
    engine = Engine(written.load(), "bfloat16")
    out = write_checkpoint(written.recipe(out_dtype="bfloat16"), engine, tmp_path / "out", STORY)
    live = floating_tensors(engine.model)
    assert live["model.norm.weight"].dtype == torch.float32
    assert live[WEIGHT].dtype == torch.bfloat16
    again = floating_tensors(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16))
    assert all(same_bits(live[name], again[name]) for name in live)


def test_the_export_is_complete(parents: tuple[TinyPool, Pool], tmp_path: Path) -> None:
    written, pool = parents
    recipe = written.recipe(*rules(), out_dtype="bfloat16")
    out = write_checkpoint(recipe, Engine(pool, "bfloat16"), tmp_path / "out", STORY)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= {
        path.name for path in out.iterdir()
    }
    assert read(out / "recipe.yaml").id == recipe.id
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata()["mergesearch_recipe"] == recipe.to_yaml()
        assert opened.metadata()["format"] == "pt"
    card = (out / "README.md").read_text()
    for word in (recipe.id, written.base, *written.models.values(), "dare_ties", "mergesearch: 0.1", "python: 3.11"):
        assert word in card


def test_no_second_copy_of_a_parent(parents: tuple[TinyPool, Pool]) -> None:
    """The pool holds each parent once, in the dtype of its files, and views of fused tensors are no copies."""
    written, _ = parents
    pool = written.load()
    for checkpoint in (pool.base, *pool.models.values()):
        assert {n: t.data_ptr() for n, t in checkpoint.tensors.items()} == {
            p.name: checkpoint.live[p.live].data_ptr() for p in pool.form.layout.pieces
        }
        size = sum(t.untyped_storage().nbytes() for t in checkpoint.live.values())
        assert size == 2 * pool.parameters
