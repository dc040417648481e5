"""Adapters: a merge exported as one, and merges of adapters that are not expanded."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny_models import TinyPool, make_model, write
from transformers import AutoModelForCausalLM

from mergesearch import methods
from mergesearch.checkpoints import load_reference
from mergesearch.checkpoints.adapters import write_adapter
from mergesearch.checkpoints.lowrank import LowRank, expanded, stored
from mergesearch.engine.adapting import adapted
from mergesearch.engine.kernels import runner
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import merge, plan
from mergesearch.engine.streaming import stream
from mergesearch.errors import UserError
from mergesearch.recipe import single_rule

TOKENS = torch.tensor([[3, 5, 7, 11, 13, 2, 4]])
PLAIN: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
OTHERS: dict[str, dict[str, Any]] = {
    "a": PLAIN,
    "b": {"r": 3, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "c": {"r": 1, "lora_alpha": 2, "target_modules": ["up_proj", "q_proj"], "rank_pattern": {"up_proj": 2}},
}


def lora(base: str, folder: Path, seed: int, **options: Any) -> str:
    """Writes an adapter with random weights."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return str(folder)


def pool_of(
    folder: Path, architecture: str = "llama", kinds: dict[str, dict[str, Any]] = OTHERS, **config: Any
) -> TinyPool:
    base = str(write(make_model(architecture, **config), folder / "base"))
    adapters = {n: lora(base, folder / n, seed, **k) for seed, (n, k) in enumerate(kinds.items())}
    return TinyPool(base, adapters)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[TinyPool, Any, Engine]:
    pool = pool_of(tmp_path_factory.mktemp("adapters"))
    loaded = pool.load()
    return pool, loaded, Engine(loaded, "float32")


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> tuple[TinyPool, Any, Engine]:
    """GPT-2, whose weights are (in, out)."""
    kinds = {
        n: {"r": r, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"]}
        for n, r in zip("abc", (2, 3, 1), strict=True)
    }
    pool = pool_of(tmp_path_factory.mktemp("turned"), "gpt2", kinds)
    loaded = pool.load()
    return pool, loaded, Engine(loaded, "float32")


def over_base(base: str, folder: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def written(found: Any, base: str, folder: Path) -> Path:
    folder.mkdir()
    write_adapter(found.adapter, base, folder, {"made": "here"})
    return folder


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "given"), [
    ("task_arithmetic", {"weight": [0.5, -0.3, 1.2]}),
    ("linear", {"weight": [0.2, 0.3, 0.9]}),
    ("tsv", {}),
    ("regmean_free", {"p": 1.0}),
    ("knots", {"density": 0.5}),
])  # fmt: skip
def test_an_exported_adapter_is_the_candidate(method, given, tiny, tmp_path):
    """Of methods whose result lies in the joint space of the adapters: PEFT over the base gives the same logits."""
    pool, loaded, engine = tiny
    recipe = pool.recipe(*single_rule(method, None, **given))
    found = adapted(recipe, loaded)
    assert found.exact and found.rank == 2 + 3 + 2 and max(found.adapter.ranks) <= 6
    folder = written(found, pool.base, tmp_path / "out")
    engine.load(recipe)
    candidate = logits(engine.model)
    torch.testing.assert_close(logits(over_base(pool.base, folder)), candidate, rtol=1e-4, atol=1e-4)
    ours, _ = load_reference(str(folder), pool.base, "here", torch.float32)
    torch.testing.assert_close(logits(ours), candidate, rtol=1e-4, atol=1e-4)
    assert (candidate - logits(AutoModelForCausalLM.from_pretrained(pool.base))).abs().max() > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == pool.base
    again = written(adapted(recipe, loaded), pool.base, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_a_smaller_rank_is_the_nearest_and_says_what_it_loses(tiny, tmp_path):
    pool, loaded, engine = tiny
    recipe = pool.recipe(*single_rule("ties", None, density=0.3))
    losses = [adapted(recipe, loaded, rank).loss for rank in (1, 3, 16)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-4
    found = adapted(recipe, loaded, 3)
    assert "missing by length" in str(found) and not found.exact and max(found.adapter.ranks) == 3
    over, _ = load_reference(str(written(found, pool.base, tmp_path / "out")), pool.base, "here", torch.float32)
    engine.load(recipe)
    missing = whole = 0.0
    for (_, a), (_, b), (_, base) in zip(
        sorted(dict(over.named_parameters()).items()), sorted(dict(engine.model.named_parameters()).items()),
        sorted(loaded.base.live.items()), strict=True,
    ):  # fmt: skip
        missing += float((a.double() - b.double()).square().sum())
        whole += float((b.double() - base.double()).square().sum())
    assert (missing / whole) ** 0.5 == pytest.approx(found.loss, rel=1e-3)


def test_other_layers_are_saved_whole(tmp_path):
    """Full fine-tunes: norms and the embedding go along as they are, and a full rank loses nothing."""
    from support.tiny_models import make_pool

    pool = make_pool(tmp_path / "pool", "llama", models=2)
    loaded = pool.load()
    recipe = pool.recipe(*single_rule("task_arithmetic", None, weight=0.6))
    found = adapted(recipe, loaded, 64)
    assert found.exact and {"model.norm", "model.embed_tokens"} <= set(found.adapter.saved)
    folder = written(found, pool.base, tmp_path / "out")
    engine = Engine(loaded, "float32")
    engine.load(recipe)
    torch.testing.assert_close(logits(over_base(pool.base, folder)), logits(engine.model), rtol=1e-4, atol=1e-4)


def test_gpt2_has_its_weights_turned(tmp_path):
    kinds = {"a": {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}}
    pool = pool_of(tmp_path / "pool", "gpt2", kinds)
    loaded = pool.load()
    recipe = pool.recipe(*single_rule("task_arithmetic", None, weight=0.7))
    found = adapted(recipe, loaded)
    assert found.exact and found.adapter.turned and max(found.adapter.ranks) == 2
    folder = written(found, pool.base, tmp_path / "out")
    engine = Engine(loaded, "float32")
    engine.load(recipe)
    torch.testing.assert_close(logits(over_base(pool.base, folder)), logits(engine.model), rtol=1e-4, atol=1e-4)


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    from support.tiny_models import make_pool

    pool = make_pool(tmp_path / "tied", "llama", models=2, tie_word_embeddings=True)
    loaded = pool.load()
    with pytest.raises(UserError, match=r"embedding that the head is tied to.*--format checkpoint"):
        adapted(pool.recipe(*single_rule("task_arithmetic")), loaded)
    with pytest.raises(UserError, match="no linear layer"):
        write_adapter(
            adapted(pool.recipe(*single_rule("task_arithmetic", None, weight=0.0)), loaded).adapter, "b", tmp_path, {}
        )
    with pytest.raises(UserError, match="without a base"):
        adapted(pool.recipe(*single_rule("linear")).model_copy(update={"base": None}), loaded)


# --- merged as factors ------------------------------------------------------------------------------------------------


def test_adapters_are_held_as_factors(tiny):
    """Of a pool of adapters nothing is in memory but the base and the factors, and they expand to what PEFT merges."""
    pool, loaded, _ = tiny
    base = {id(tensor) for tensor in loaded.base.live.values()}
    for name, folder in pool.models.items():
        live = loaded.models[name].live
        factors = {key: tensor for key, tensor in live.items() if isinstance(tensor, LowRank)}
        assert factors and all(id(t) in base for key, t in live.items() if key not in factors)
        assert all(id(t.start) in base and t.a.shape[0] <= 3 for t in factors.values())
        whole = over_base(pool.base, Path(folder)).merge_and_unload()
        for key, tensor in whole.named_parameters():
            assert torch.equal(expanded(live[key]), tensor), key
        assert torch.equal(next(iter(factors.values())) * 1.0, expanded(next(iter(factors.values()))))


@pytest.mark.parametrize(("method", "given"), [
    ("task_arithmetic", {"weight": [0.5, -0.3, 1.2], "lambda": 0.8}),
    ("task_arithmetic", {"weight": [0.5, 0.3, 1.2], "normalize": True}),
    ("linear", {"weight": [0.2, 0.3, 0.9]}),
    ("linear", {"weight": [0.2, 0.3, 0.9], "normalize": False}),
    ("uniform_soup", {}),
])  # fmt: skip
def test_sums_of_factors_equal_expanded_merges_in_float64(method, given, tiny):
    """And are nearer to them than the merge of expanded weights in float32 is, or as near."""
    pool, loaded, engine = tiny
    engine.load(pool.recipe(*single_rule("linear")))
    engine.load(pool.recipe(*single_rule(method, None, **given)))
    known = methods.get(method)
    complete = known.complete(given, list(pool.models), "the test")
    for name, live in engine.model.named_parameters():
        base = loaded.base.live[name].double()
        parents = []
        for model in loaded.models.values():
            held = model.live[name]
            change = held.b.double() @ held.a.double() * held.scale if isinstance(held, LowRank) else 0.0
            parents.append(base + change)
        wanted = known(base, parents, complete)
        assert (live.double() - wanted).abs().max() <= 4e-7 * max(1.0, float(wanted.abs().max())), name


def in_float64(loaded: Any, name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor of the base and of each adapter over it, expanded in float64."""
    base = loaded.base.live[name].double()
    parents = []
    for model in loaded.models.values():
        held = model.live[name]
        change = held.b.double() @ held.a.double() * held.scale if isinstance(held, LowRank) else torch.zeros_like(base)
        parents.append(base + (change.T if isinstance(held, LowRank) and held.turned else change))
    return base, parents


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "given"), [
    ("tsv", {"weight": [0.5, 0.9, 1.2], "lambda": 0.8}),
    ("tsv", {"rank": 0.1}),
    ("star", {"eta": 0.6}),
    ("iso", {"a": 0.3, "weight": [0.5, 0.9, 1.2]}),
    ("iso_cts", {"common": 0.7}),
    ("regmean_free", {"weight": [0.5, 0.9, 1.2]}),
    ("regmean_free", {"p": 1.0}),
    ("resmerge", {}),
    ("knots", {"density": 0.5, "weight": [0.5, 0.9, 1.2]}),
    ("knots_dare", {"density": 0.5}),
])  # fmt: skip
def test_joint_forms_equal_expanded_merges_in_float64(method, given, architecture, tiny, turned):
    """In the space that the adapters share nothing is lost; a share of a rank, a ridge and noise are the whole's."""
    pool, loaded, engine = tiny if architecture == "llama" else turned
    engine.load(pool.recipe(*single_rule("linear")))
    recipe = pool.recipe(*single_rule(method, None, **given))
    joint = spied(engine, recipe)
    known = methods.get(method)
    complete = known.complete(given, list(pool.models), "the test")
    assert joint, "no tensor was merged jointly"
    for job in plan(recipe, loaded):
        if job.info.name not in joint:
            continue
        base, parents = in_float64(loaded, job.info.name)
        wanted = known(base, parents, complete, [methods.mask_key(0, m, job.info.name) for m in pool.models])
        live = dict(engine.model.named_parameters())[job.info.name].double()
        change = float((wanted - base).norm())
        assert change > 0
        # the base and the result are float32
        assert (live - wanted).norm() <= 1e-6 * change + 2.0**-24 * float(wanted.norm()), job.info.name


def spied(engine: Engine, recipe: Any) -> set[str]:
    """Loads a recipe; the tensors that were merged in the space that the adapters share."""
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        known = runner.merged_jointly
        patch.setattr(runner, "merged_jointly", lambda call, merge: [known(call, merge), seen.add(merge.label)][0])
        engine.load(recipe)
    return seen


def test_twenty_adapters_take_their_factors_and_the_base(tmp_path):
    """What is held while and after candidates of every kind are made: the base, the live model, the factors."""
    kinds = {f"m{n}": {**PLAIN, "r": 1 + n % 2} for n in range(20)}
    pool = pool_of(tmp_path, kinds=kinds, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    before = held_bytes()
    loaded = pool.load()
    engine = Engine(loaded, "float32", kept=0)
    stated = sum(t.nbytes for t in stored([*loaded.base.live.values()]))
    factors = sum(t.nbytes for m in loaded.models.values() for t in stored(m.live.values()) if t.shape.numel() and any(
        t is part for held in m.live.values() if isinstance(held, LowRank) for part in (held.b, held.a)
    ))  # fmt: skip
    assert factors < stated < 20 * stated / 4
    for method in ("task_arithmetic", "tsv", "iso", "regmean_free", "knots", "ties", "dare_ties"):
        engine.load(pool.recipe(*single_rule(method)))
        # the base, the live model, the factors, and small change
        assert held_bytes() - before <= 2 * stated + factors + stated / 4, method


def held_bytes() -> int:
    """Of all tensors' memory in this process, each storage once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("method", ["ties", "dare_ties", "consensus", "tsv+svc"])
def test_other_methods_expand_one_tensor_at_a_time(method, tiny):
    pool, loaded, engine = tiny
    recipe = pool.recipe(*single_rule(method, None, **({"density": 0.5} if "ties" in method else {})))
    engine.load(recipe)
    dtypes = {name: tensor.dtype for name, tensor in loaded.base.live.items()}
    live = dict(engine.model.named_parameters())
    for job, wanted in merge(plan(recipe, loaded), loaded, 0, dtypes):
        assert torch.equal(job.piece.view(live), wanted), job.info.name


def test_the_exported_checkpoint_is_the_candidate_that_was_scored(tiny, tmp_path):
    """In memory, from files to files, and with parents mapped: one way of adding factors, the same bytes."""
    pool, _, engine = tiny
    recipe = pool.recipe(*single_rule("task_arithmetic", None, weight=[0.5, -0.3, 1.2]))
    engine.load(recipe)
    (tmp_path / "out").mkdir()
    mapped = pool.load(residency="mapped")
    assert any(isinstance(t, LowRank) for t in mapped.models["a"].live.values())
    stream(recipe, mapped, tmp_path / "out", {})
    from support.tiny_models import file_tensors

    held = file_tensors(tmp_path / "out")
    assert all(torch.equal(held[name], tensor) for name, tensor in engine.model.named_parameters() if name in held)


def test_mixed_pools_and_stacks(tiny, tmp_path):
    """A full model beside adapters; a stack whose layers are an adapter's passed through."""
    pool, _, _ = tiny
    full = str(write(make_model("llama", seed=0), tmp_path / "full"))
    mixed = TinyPool(pool.base, {"a": pool.models["a"], "full": full})
    loaded = mixed.load(allow_unrelated=True)
    engine = Engine(loaded, "float32")
    engine.load(mixed.recipe(*single_rule("task_arithmetic", None, weight=[0.5, 0.25])))
    wanted, _ = load_reference(pool.models["a"], pool.base, "here", torch.float32)
    base = loaded.base.live
    for name, live in engine.model.named_parameters():
        tuned, other = dict(wanted.named_parameters())[name], loaded.models["full"].live[name]
        torch.testing.assert_close(
            live, base[name] + 0.5 * (tuned - base[name]) + 0.25 * (other - base[name]), atol=1e-6, rtol=1e-5
        )
    stacked = mixed.recipe(*single_rule("passthrough", None), stack=({"a": (0, 1)}, {"a": (0, 0)}))
    engine.load(stacked)
    query = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(
        dict(engine.model.named_parameters())[query], dict(wanted.named_parameters())[query.replace("2", "0")]
    )
