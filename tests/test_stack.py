"""Layer stacking: rows of layers from several models become one deeper or shallower model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import ARCHITECTURES, MOE, TinyPool, file_tensors, make_pool, same_bits
from transformers import AutoModelForCausalLM

from mergesearch.checkpoints import Pool, floating_tensors
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import check, plan
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe, Rule
from mergesearch.results.card import Story, write_checkpoint

STORY = Story("a test", {"python": "3"})
PASS = Rule(method="passthrough")
TOKENS = torch.tensor([[3, 5, 7, 11, 13, 2, 4, 9, 8, 6]])
FRANKENMERGE = ({"a": (0, 1)}, {"b": (0, 1)}, {"a": (1, 1)})
ORIGINS = (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 1))


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, tuple[TinyPool, Pool]] = {}

    def get(architecture: str = "llama") -> tuple[TinyPool, Pool]:
        if architecture not in made:
            written = make_pool(tmp_path_factory.mktemp(architecture), architecture)
            made[architecture] = (written, written.load())
        return made[architecture]

    return get


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def by_hand(model: torch.nn.Module, pool: Pool, origins: Any) -> None:
    """The layers of the live model are these layers of these parents, tensor by tensor."""
    prefix = pool.form.layout.prefix
    live = floating_tensors(model)
    for number, (name, layer) in enumerate(origins):
        for tensor_name, tensor in pool.parent(name).live.items():
            if tensor_name.startswith(f"{prefix}{layer}."):
                assert same_bits(live[tensor_name.replace(f"{prefix}{layer}.", f"{prefix}{number}.")], tensor)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frankenmerge_of_every_architecture(architecture: str, parents: Any, tmp_path: Path) -> None:
    written, pool = parents(architecture)
    engine = Engine(pool, "float32")
    out = write_checkpoint(written.recipe(PASS, stack=FRANKENMERGE), engine, tmp_path / "out", STORY)
    by_hand(engine.model, pool, ORIGINS)
    assert engine.model.config.num_hidden_layers == 5
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert same_bits(logits(engine.model), logits(model.eval()))
    assert model.config.num_hidden_layers == 5
    expected = {n for n in file_tensors(written.base) if not any(f".{i}." in n for i in (0, 1))}
    assert {n for n in file_tensors(out) if not any(f".{i}." in n for i in range(5))} >= expected
    assert "passthrough" in (out / "README.md").read_text()


def test_it_runs_as_layers_applied_in_turn(parents: Any) -> None:
    """Against a model built by hand: the same layer modules in a list."""
    written, pool = parents()
    engine = Engine(pool, "float32")
    engine.load(written.recipe(PASS, stack=FRANKENMERGE))
    models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, path in written.models.items()}
    whole = models["a"]
    layers = [models[name].model.layers[layer] for name, layer in ORIGINS]
    import copy

    whole.model.layers = torch.nn.ModuleList(copy.deepcopy(layer) for layer in layers)
    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = number
    whole.config.num_hidden_layers = 5
    assert same_bits(logits(engine.model), logits(whole))
    ours = engine.model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert ours.tolist() == whole.generate(TOKENS, max_new_tokens=6, do_sample=False).tolist()


def test_lists_with_one_entry_for_each_layer_follow(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention"]
    written = make_pool(tmp_path, "gemma2", num_hidden_layers=3, layer_types=types)
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(
        written.recipe(PASS, stack=({"a": (1, 2)}, {"b": (0, 1)}, {"a": (0, 0)})), engine, tmp_path / "out", STORY
    )
    full, sliding = "full_attention", "sliding_attention"
    expected = [full, full, sliding, full, sliding]
    assert engine.model.config.layer_types == expected
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.layer_types == expected
    windows = [layer.self_attn.sliding_window is not None for layer in model.model.layers]
    assert windows == [t == sliding for t in expected]
    assert same_bits(logits(engine.model), logits(model))


def test_lists_of_layer_numbers_follow(tmp_path: Path) -> None:
    written = make_pool(tmp_path, "qwen3_moe", mlp_only_layers=[0])
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(
        written.recipe(PASS, stack=({"a": (1, 1)}, {"b": (0, 1)}, {"a": (0, 0)})), engine, tmp_path / "out", STORY
    )
    assert engine.model.config.mlp_only_layers == [1, 3]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert same_bits(logits(engine.model), logits(model.eval()))
    assert "model.layers.1.mlp.down_proj.weight" in file_tensors(out)


def test_layers_of_another_structure_cannot_be_stacked(tmp_path: Path) -> None:
    written = make_pool(tmp_path, "qwen3_moe", mlp_only_layers=[0])
    recipe = written.recipe(Rule(method="linear"), stack=({"a": (0, 0), "b": (1, 1)},))
    with pytest.raises(UserError, match=r"layer 1 of b cannot become layer 0 .* stack layers of one structure"):
        plan(recipe, written.load())


def test_passed_through_tensors_are_the_parents_memory(parents: Any) -> None:
    written, pool = parents()
    engine = Engine(pool, "float32")
    engine.load(written.recipe(PASS, stack=FRANKENMERGE))
    parents_memory = {t.data_ptr() for c in (*pool.models.values(), pool.base) for t in c.live.values()}
    live = dict(engine.model.named_parameters())
    assert all(tensor.data_ptr() in parents_memory for tensor in live.values())
    weight = "model.layers.{}.mlp.down_proj.weight"
    assert live[weight.format(2)].data_ptr() == pool.models["b"].live[weight.format(0)].data_ptr()
    assert live[weight.format(1)].data_ptr() == live[weight.format(4)].data_ptr()


@pytest.mark.parametrize("architecture", MOE)
def test_fused_experts_are_shared_whole(architecture: str, parents: Any) -> None:
    written, pool = parents(architecture)
    engine = Engine(pool, "float32")
    engine.load(written.recipe(PASS, stack=FRANKENMERGE))
    name = "model.layers.{}.mlp.experts.gate_up_proj"
    live = dict(engine.model.named_parameters())
    assert live[name.format(3)].data_ptr() == pool.models["b"].live[name.format(1)].data_ptr()


def test_what_is_scaled_or_rounded_is_not_shared(parents: Any) -> None:
    written, pool = parents()
    memory = {t.data_ptr() for c in (*pool.models.values(), pool.base) for t in c.live.values()}
    scaled = Engine(pool, "float32")
    scaled.load(written.recipe(Rule(method="passthrough", parameters={"scale": 0.5}), stack=({"a": (0, 1)},)))
    rounded = Engine(pool, "bfloat16")
    rounded.load(written.recipe(PASS, stack=({"a": (0, 1)},), out_dtype="bfloat16"))
    for engine in (scaled, rounded):
        assert not memory & {tensor.data_ptr() for tensor in engine.model.parameters()}
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(dict(scaled.model.named_parameters())[norm], pool.models["a"].live[norm] / 2)


def test_candidates_of_different_depth_one_after_another(parents: Any) -> None:
    """The live model stays one object, every candidate equals a fresh engine's, and no parent is ever written to."""
    written, pool = parents()
    before = {(name, n): t.clone() for name in ("base", "a", "b") for n, t in pool.parent(name).live.items()}
    flat = written.recipe(Rule(method="ties", parameters={"density": 0.5}))
    recipes = [
        flat,
        written.recipe(PASS, stack=FRANKENMERGE),
        written.recipe(Rule(method="linear"), stack=FRANKENMERGE),
        written.recipe(PASS, stack=FRANKENMERGE),
        written.recipe(PASS, stack=({"b": (1, 1)},)),
        written.recipe(Rule(components=("mlp",), method="linear"), PASS, stack=({"b": (0, 0)}, {"a": (0, 1)})),
        flat,
        written.recipe(),
    ]
    engine = Engine(pool, "float32")
    model = engine.model
    for recipe in recipes:
        engine.load(recipe)
        fresh = Engine(pool, "float32")
        fresh.load(recipe)
        assert engine.model is model
        ours, theirs = floating_tensors(model), floating_tensors(fresh.model)
        assert ours.keys() == theirs.keys()
        assert all(same_bits(ours[name], theirs[name]) for name in ours)
        assert same_bits(logits(model), logits(fresh.model))
    assert all(same_bits(pool.parent(name).live[n], tensor) for (name, n), tensor in before.items())


def test_writing_a_repeated_layer_writes_it_twice(parents: Any, tmp_path: Path) -> None:
    written, pool = parents()
    engine = Engine(pool, "float32")
    recipe = written.recipe(PASS, stack=({"a": (0, 1)}, {"a": (0, 1)}))
    found = file_tensors(write_checkpoint(recipe, engine, tmp_path / "out", STORY))
    names = [name for name in found if name.startswith("model.layers.0.")]
    assert len(names) == 9
    assert all(same_bits(found[n], found[n.replace("layers.0", "layers.2")]) for n in names)
    engine.load(written.recipe(Rule(method="linear"), stack=({"a": (0, 1)}, {"a": (0, 1)})))
    assert all(same_bits(pool.models["a"].live[n], file_tensors(written.models["a"])[n]) for n in names)


def test_rows_with_several_sources_are_merged(parents: Any) -> None:
    written, pool = parents()
    engine = Engine(pool, "float32")
    recipe = written.recipe(
        Rule(layers=(0, 0), method="passthrough"),
        Rule(layers=(1, 2), method="linear", parameters={"weight": {"a": 3.0, "b": 1.0}}),
        stack=({"a": (0, 0)}, {"a": (0, 1), "b": (0, 1)}),
    )
    engine.load(recipe)
    live, a, b = floating_tensors(engine.model), pool.models["a"].live, pool.models["b"].live
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert same_bits(live[name.format(0)], a[name.format(0)])
    for layer in (0, 1):
        expected = (3 * a[name.format(layer)] + b[name.format(layer)]) / 4
        torch.testing.assert_close(live[name.format(layer + 1)], expected)
    # embeddings belong to the first row, head and final norm to the last
    assert same_bits(live["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    torch.testing.assert_close(live["lm_head.weight"], (3 * a["lm_head.weight"] + b["lm_head.weight"]) / 4)


@pytest.mark.parametrize("base_layer", [None, 0])
def test_the_base_of_a_row(base_layer: int | None, parents: Any) -> None:
    """A row that does not name the base takes the layers of its first source from it."""
    written, pool = parents()
    engine = Engine(pool, "float32")
    row = {"a": (1, 1), "b": (0, 0)} | ({} if base_layer is None else {"base": (base_layer, base_layer)})
    engine.load(written.recipe(Rule(method="task_arithmetic"), stack=(row,)))
    name = "model.layers.{}.mlp.up_proj.weight"
    base = pool.base.live[name.format(1 if base_layer is None else base_layer)]
    expected = pool.models["a"].live[name.format(1)] + pool.models["b"].live[name.format(0)] - base
    torch.testing.assert_close(floating_tensors(engine.model)[name.format(0)], expected)


def test_a_row_of_the_base_alone(parents: Any) -> None:
    written, pool = parents()
    engine = Engine(pool, "float32")
    engine.load(written.recipe(PASS, stack=({"base": (1, 1)}, {"a": (0, 0)})))
    by_hand(engine.model, pool, (("base", 1), ("a", 0)))


def test_a_rule_picks_models_of_a_row_and_their_weights(parents: Any) -> None:
    written, pool = parents()
    rule = Rule(method="linear", models=("b", "a"), parameters={"weight": [1.0, 3.0]})
    jobs = plan(written.recipe(rule, stack=({"a": (0, 0)}, {"a": (1, 1), "b": (1, 1)})), pool)
    steps = {job.info.layer: job.step for job in jobs}
    assert (steps[0].models, steps[0].parameters["weight"]) == (("a",), [3.0])
    assert (steps[1].models, steps[1].parameters["weight"]) == (("b", "a"), [1.0, 3.0])


def test_masks_of_a_repeated_layer_differ(parents: Any) -> None:
    written, pool = parents()
    engine = Engine(pool, "float32")
    rule = Rule(method="dare_linear", parameters={"density": 0.5})
    engine.load(written.recipe(rule, stack=({"a": (0, 0), "b": (0, 0)}, {"a": (0, 0), "b": (0, 0)})))
    live = floating_tensors(engine.model)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(live[name.format(0)], live[name.format(1)])


@pytest.mark.parametrize(
    ("stack", "rule", "said"),
    [
        (({"a": (0, 2)},), PASS, r"a has layers 0 to 1, not 2"),
        (({"a": (0, 1), "b": (0, 1)},), PASS, r"passthrough .* merges exactly 1 model, not 2"),
        (({"a": (0, 1)},), Rule(method="linear", models=("b",)), r"the rule merges b, the row has a"),
        (({"a": (0, 1)},), Rule(method="linear", parameters={"weight": {"c": 1.0}}), r"unknown model of weight 'c'"),
        (({"a": (0, 1)},), Rule(layers=(0, 0), method="linear"), r"no rule of recipe .* covers tensor 'model.layers.1"),
    ],
)
def test_stacks_that_are_refused(stack: Any, rule: Rule, said: str, parents: Any) -> None:
    written, pool = parents()
    with pytest.raises(UserError, match=said):
        Engine(pool, "float32").load(written.recipe(rule, stack=stack))


def test_a_stack_of_the_base_needs_one(parents: Any) -> None:
    written, _ = parents()
    recipe = Recipe(models=written.models, rules=(PASS,), stack=({"base": (0, 1)},), out_dtype="float32")
    with pytest.raises(UserError, match=r"takes layers of the base, but the recipe names none"):
        check(recipe)


def test_the_merge_command_stacks(parents: Any, tmp_path: Path) -> None:
    from mergesearch.commands.merge import merge_recipe

    written, pool = parents()
    recipe = written.recipe(PASS, stack=FRANKENMERGE)
    merge_recipe(recipe, tmp_path / "out", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    by_hand(model, pool, ORIGINS)
    assert recipe.id in (tmp_path / "out" / "README.md").read_text()
