"""Adapters: a merge exported as one, and merges of adapters that are not expanded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.tiny_models import TinyPool, make_model, write
from transformers import AutoModelForCausalLM

from mergesearch.checkpoints import load_reference
from mergesearch.checkpoints.adapters import write_adapter
from mergesearch.engine.adapting import adapted
from mergesearch.engine.live import Engine
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
    with pytest.raises(UserError, match="embedding that the head is tied to.*--format checkpoint"):
        adapted(pool.recipe(*single_rule("task_arithmetic")), loaded)
    with pytest.raises(UserError, match="no linear layer"):
        write_adapter(
            adapted(pool.recipe(*single_rule("task_arithmetic", None, weight=0.0)), loaded).adapter, "b", tmp_path, {}
        )
    with pytest.raises(UserError, match="without a base"):
        adapted(pool.recipe(*single_rule("linear"), base=None), loaded)
