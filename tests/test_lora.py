"""PEFT adapters as models: plain, rank-stabilised and weight-decomposed LoRA, modules_to_save; refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import TinyPool, file_tensors, make_model, make_pool, same_bits, write

from mergesearch.checkpoints import floating_tensors, load_reference
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.recipe import Rule
from mergesearch.results.card import Story, write_checkpoint

peft = pytest.importorskip("peft")
STORY = Story("a test", {"python": "3"})
TOKENS = torch.tensor([[3, 5, 7, 11, 13, 2, 4]])
QUERY = "model.layers.0.self_attn.q_proj.weight"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_stabilised": {"use_rslora": True, "r": 4, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "ia3": {"ia3": True},
}


def adapt(model: torch.nn.Module, folder: Path, seed: int = 0, base: str = "", **options: Any) -> torch.nn.Module:
    """Writes an adapter with random weights over `model`, and returns peft's own live model."""
    if options.pop("ia3", False):
        made = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    else:
        made = peft.LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **options}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return adapted.eval()


def base_of(folder: Path, dtype: str = "float32", architecture: str = "llama", **config: Any) -> str:
    return str(write(make_model(architecture, dtype=dtype, **config), folder))


def assert_runs_as(adapted: torch.nn.Module, base: str, adapter: Path) -> None:
    """The adapter over the base, merged alone by the engine, gives peft's own logits."""
    written = TinyPool(base, {"a": str(adapter)})
    engine = Engine(written.load(), "float32")
    engine.load(written.recipe())
    with torch.no_grad():
        torch.testing.assert_close(engine.model(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_every_kind_is_what_peft_computes(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapters, expected = {}, {}
    for kind, options in KINDS.items():
        adapted = adapt(make_model(), tmp_path / kind, **options)
        with torch.no_grad():
            expected[kind] = adapted(TOKENS).logits
        adapters[kind] = str(tmp_path / kind)
    written = TinyPool(base, adapters)
    engine = Engine(written.load(), "float32")
    plain = expected["plain"]
    for kind in adapters:
        engine.load(written.recipe(Rule(method="passthrough", models=(kind,))))
        with torch.no_grad():
            torch.testing.assert_close(engine.model(TOKENS).logits, expected[kind], rtol=1e-4, atol=1e-5)
        assert kind == "plain" or not torch.allclose(expected[kind], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "falcon"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    targets = {"gpt2": ["c_attn", "c_proj"], "phi3": ["qkv_proj"], "falcon": ["query_key_value"]}[architecture]
    base = base_of(tmp_path / "base", architecture=architecture)
    adapted = adapt(
        make_model(architecture), tmp_path / "lora", target_modules=targets, fan_in_fan_out=architecture == "gpt2"
    )
    assert_runs_as(adapted, base, tmp_path / "lora")


def test_trained_biases_are_kept(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", attention_bias=True)
    adapted = adapt(make_model(attention_bias=True), tmp_path / "lora", bias="lora_only")
    assert_runs_as(adapted, base, tmp_path / "lora")


def test_a_small_delta_survives_a_bfloat16_base(tmp_path: Path) -> None:
    """The delta is far below the spacing of bfloat16 numbers at the weights: it is kept in float32 until the merge."""
    base = base_of(tmp_path / "base", "bfloat16")
    adapted = adapt(make_model(dtype="bfloat16"), tmp_path / "lora", modules_to_save=["lm_head"])
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-3)
        delta = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    adapted.save_pretrained(tmp_path / "lora")
    pool = TinyPool(base, {"a": str(tmp_path / "lora")}).load()
    ours = pool.models["a"].tensors
    assert ours[QUERY].dtype == torch.float32
    torch.testing.assert_close(ours[QUERY] - pool.base.tensors[QUERY].float(), delta, rtol=1e-2, atol=1e-8)
    rounded = pool.base.tensors[QUERY] + delta.to(torch.bfloat16)
    assert (rounded == pool.base.tensors[QUERY]).float().mean() > 0.5
    # what the adapter does not touch is the base's own memory
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert ours[untouched].data_ptr() == pool.base.tensors[untouched].data_ptr()
    assert ours["lm_head.weight"].dtype == torch.float32


def test_an_adapter_over_a_model_that_is_named(tmp_path: Path) -> None:
    written = make_pool(tmp_path, models=2)
    over_a = adapt(_loaded(written.models["a"]), tmp_path / "lora")
    with torch.no_grad():
        expected = over_a(TOKENS).logits
    reference = f"{written.models['a']}+{tmp_path / 'lora'}"
    both = TinyPool(written.base, {"a": written.models["a"], "tuned": reference, "over_base": str(tmp_path / "lora")})
    pool = both.load()
    engine = Engine(pool, "float32")
    engine.load(both.recipe(Rule(method="passthrough", models=("tuned",))))
    with torch.no_grad():
        torch.testing.assert_close(engine.model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(pool.models["tuned"].tensors[QUERY], pool.models["over_base"].tensors[QUERY])


def test_an_adapter_over_an_adapted_base(tmp_path: Path) -> None:
    """`base_model: path+lora` is the base; an adapter alone lies over all of it."""
    base = base_of(tmp_path / "base")
    adapt(_loaded(base), tmp_path / "first")
    second = adapt(_loaded(base), tmp_path / "second", seed=7)
    del second
    written = TinyPool(
        f"{base}+{tmp_path / 'first'}", {"a": str(tmp_path / "second"), "b": f"{base}+{tmp_path / 'second'}"}
    )
    pool = written.load()
    own = file_tensors(base)[QUERY]
    first, both, alone = (c.tensors[QUERY] - own for c in (pool.base, pool.models["a"], pool.models["b"]))
    torch.testing.assert_close(both, first + alone, rtol=1e-4, atol=1e-6)


def test_adapters_are_merged_and_exported_like_models(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "bfloat16")
    for seed, name in enumerate(("a", "b")):
        adapt(make_model(dtype="bfloat16"), tmp_path / name, seed)
    written = TinyPool(base, {name: str(tmp_path / name) for name in ("a", "b")})
    engine = Engine(written.load(), "bfloat16")
    recipe = written.recipe(Rule(method="ties", parameters={"density": 0.5}), out_dtype="bfloat16")
    out = write_checkpoint(recipe, engine, tmp_path / "out", STORY)
    ours = floating_tensors(engine.model)
    assert all(same_bits(tensor, ours[name]) for name, tensor in file_tensors(out).items())
    assert str(tmp_path / "a") in (out / "README.md").read_text()
    assert not (out / "adapter_config.json").exists()


def test_a_head_of_its_own_over_a_tied_base(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", architecture="gpt2")
    adapted = adapt(
        make_model("gpt2"),
        tmp_path / "lora",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        modules_to_save=["lm_head"],
    )
    with torch.no_grad():
        expected = adapted(TOKENS).logits
    written = TinyPool(base, {"a": str(tmp_path / "lora")})
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(Rule(method="passthrough")), engine, tmp_path / "out", STORY)
    assert "lm_head.weight" in file_tensors(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.no_grad():
        torch.testing.assert_close(engine.model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(_loaded(str(out))(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_one_of_two_tied_layers(target: str, dtype: str, tmp_path: Path) -> None:
    """peft adds to the one and not to the other, so they are no longer tied."""
    base = base_of(tmp_path / "base", dtype, tie_word_embeddings=True)
    adapt(make_model(dtype=dtype, tie_word_embeddings=True), tmp_path / "lora", target_modules=[target])
    written = TinyPool(base, {"a": str(tmp_path / "lora")})
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(_loaded(base).float(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(engine.model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(_loaded(str(out))(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)
    merged, before = file_tensors(out), file_tensors(base)["model.embed_tokens.weight"].float()
    untouched = "model.embed_tokens.weight" if target == "lm_head" else "lm_head.weight"
    assert same_bits(merged[untouched], before)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_adapters_of_fused_experts(architecture: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", architecture=architecture)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = adapt(make_model(architecture), tmp_path / "lora", target_modules=["q_proj"], target_parameters=experts)
    assert_runs_as(adapted, base, tmp_path / "lora")


def test_score_takes_an_adapter(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapted = adapt(make_model(), tmp_path / "lora")
    model, tokenizer = load_reference(str(tmp_path / "lora"), base, "MODEL", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert len(tokenizer) == 63


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(base: str, adapter: Path) -> str:
    with pytest.raises(UserError) as error:
        TinyPool(base, {"a": str(adapter)}).load()
    said = str(error.value)
    assert said.startswith("models.a: ") and "\n" not in said and len(said) < 700
    return said


@pytest.mark.parametrize(
    ("other", "word"),
    [({"hidden_size": 32}, "size mismatch"), ({"num_hidden_layers": 3}, "has the unknown .*layers.2")],
)
def test_an_adapter_of_another_base(other: dict[str, int], word: str, tmp_path: Path) -> None:
    import re

    base = base_of(tmp_path / "base")
    adapt(make_model(**other), tmp_path / "lora", base="meta/Other-7B")
    said = refused(base, tmp_path / "lora")
    assert re.search(word, said)
    assert "does not fit its base" in said and "it was trained on meta/Other-7B" in said
    assert said.endswith("name the base it was trained on")


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapt(make_model("gpt2"), tmp_path / "lora", target_modules=["c_attn"], fan_in_fan_out=True)
    assert "does not fit its base" in refused(base, tmp_path / "lora")


def test_the_bases_name_is_only_a_hint(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapt(make_model(), tmp_path / "lora", base="somebody/elsewhere")
    assert TinyPool(base, {"a": str(tmp_path / "lora")}).load().models["a"]


def test_an_adapter_that_cannot_become_weights(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapted = peft.get_peft_model(make_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    adapted.save_pretrained(tmp_path / "prompt")
    assert "is a PROMPT_TUNING adapter, which cannot be merged into weights" in refused(base, tmp_path / "prompt")


@pytest.mark.parametrize("damage", ["pickled", "cut", "missing", "nan", "short"])
def test_a_damaged_adapter(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = base_of(tmp_path / "base")
    adapt(make_model(), tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "pickled":
        torch.save(tensors, file.with_suffix(".bin"))
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "missing":
        file.unlink()
    elif damage == "nan":
        tensors[sorted(tensors)[0]][0] = float("nan")
        save_file(tensors, file)
    else:
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, file)
    said = refused(base, tmp_path / "lora")
    words = {
        "pickled": "holds pickled weights alone (adapter_model.bin)",
        "cut": "is truncated or corrupt",
        "missing": "has no adapter_model.safetensors",
        "nan": "holds NaN or infinity",
        "short": "it lacks",
    }
    assert words[damage] in said


def test_an_adapter_as_the_base(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapt(make_model(), tmp_path / "lora")
    with pytest.raises(UserError, match=r"base_model: \S+ is an adapter, not a model: name the checkpoint"):
        TinyPool(str(tmp_path / "lora"), {"a": base}).load()


def test_what_stands_after_the_plus_must_be_an_adapter(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    with pytest.raises(UserError, match=r"models.a: \S+ in \S+ has no adapter_config.json: put a PEFT adapter after"):
        TinyPool(base, {"a": f"{base}+{base}"}).load()


def _loaded(folder: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()
