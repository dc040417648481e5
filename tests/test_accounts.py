"""What becomes of every tensor of every parent: named, counted, written beside the export; towers of vision models."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from support.tiny_models import TinyPool, file_tensors, fine_tune, make_pool, make_tokenizer, same_bits, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mergesearch.checkpoints import Pool, Survey, is_causal
from mergesearch.commands.merge import merge_recipe
from mergesearch.engine.accounts import accounts, summary
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import plan
from mergesearch.errors import UserError
from mergesearch.evaluate.model import RememberingLM
from mergesearch.recipe import Recipe, Rule, single_rule
from mergesearch.results.card import Asking, Story, model_card

_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}},
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59,
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 4, "sliding_window": 8},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        "mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59,
    },
}  # fmt: skip


def vision_pool(folder: Path, architecture: str) -> TinyPool:
    config = AutoConfig.for_model(architecture, **VISION[architecture])
    for number, name in enumerate(("base", "a", "b")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config)
        write(fine_tune(model, number) if number else model, folder / name)
    return TinyPool(str(folder / "base"), {name: str(folder / name) for name in "ab"})


@pytest.mark.parametrize("architecture", sorted(VISION))
def test_a_card_names_the_command_that_loads_the_architecture(architecture: str, tmp_path: Path) -> None:
    folder = Path(vision_pool(tmp_path, architecture).base)
    loaded = is_causal(folder, "base_model")
    if loaded:
        AutoModelForCausalLM.from_pretrained(folder)
    else:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForCausalLM.from_pretrained(folder)
    recipe = Recipe(base="base", models={"a": "a"}, rules=single_rule("linear"))
    told = model_card(
        recipe, Story("title", {}, tasks={"quiz": None}, samples={"quiz": [0]}, asking=Asking(loaded=loaded))
    )
    assert ("lm_eval --model hf --model_args" in told) is loaded
    assert ("mergesearch score . --config" in told) is not loaded


def fates(recipe: Recipe, tiny: TinyPool, **options: Any) -> dict[tuple[str, str], str]:
    return {(e.parent, e.tensor): e.became for e in accounts(recipe, tiny.load(**options))}


def test_every_tensor_of_every_parent_is_named(tmp_path: Path) -> None:
    tiny = make_pool(tmp_path, "qwen3_moe", models=3)
    recipe = tiny.recipe(
        Rule(components=("router",), method="passthrough", models=("a",)),
        Rule(components=("experts",), method="ties"),
        Rule(components=("norm",), method="linear", models=("a", "b")),
        Rule(method="task_arithmetic", parameters={"weight": 0.3}),
    )
    told = fates(recipe, tiny)
    files = {"base": tiny.base, **tiny.models}
    assert told.keys() == {(parent, name) for parent, folder in files.items() for name in file_tensors(folder)}
    expert, router = "model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.1.mlp.gate.weight"
    assert told["c", expert] == "merged by rule 2 (ties), all.experts"
    assert told["base", expert] == "the base of what is merged by rule 2 (ties), all.experts"
    assert told["a", router] == "copied by rule 1 (passthrough), all.router"
    assert told["b", router] == "takes no part: copied by rule 1 (passthrough), all.router of a"
    assert told["b", "model.norm.weight"] == "averaged by rule 3 (linear), all.norm"
    assert told["c", "model.norm.weight"] == "takes no part: averaged by rule 3 (linear), all.norm of a, b"
    assert told["b", "lm_head.weight"] == "merged by rule 4 (task_arithmetic), all"
    assert "averaged by rule 3 (linear), all.norm: 9 of a, 9 of b" in summary(accounts(recipe, tiny.load()))
    outline = Pool.outline(Survey(tiny.base, tiny.models, False))
    assert fates(recipe, tiny, residency="mapped") == told
    assert {(e.parent, e.tensor): e.became for e in accounts(recipe, outline)} == told


def test_stacks_and_vocabularies(tmp_path: Path) -> None:
    tiny = make_pool(tmp_path / "pool", num_hidden_layers=3)
    stack = tiny.recipe(Rule(method="passthrough"), stack=({"a": (0, 1)}, {"a": (1, 1)}))
    told = fates(stack, tiny)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert told["a", name.format(0)] == "copied by rule 1 (passthrough), all"
    assert told["a", name.format(1)].endswith(f"copied by rule 1 (passthrough), all -> {name.format(2)}")
    assert told["a", name.format(2)] == told["b", name.format(2)] == "left out: the stack takes no layer like it"
    write(
        fine_tune(make_model_with(66), 1), tmp_path / "more", make_tokenizer([f"w{n}" for n in range(60)] + ["x", "y"])
    )
    models = {**tiny.models, "more": str(tmp_path / "more")}
    wide = TinyPool(tiny.base, models)
    recipe = wide.recipe(tokenizer="union")
    pool = wide.load(tokenizer="union")
    assert pool.tokens.startswith(
        "the base's tokens and after them the others': 65 in 65 rows; 2 tokens ('x', 'y') not in the base, a, b;"
    )
    told = {(e.parent, e.tensor): e.became for e in accounts(recipe, pool)}
    assert told["more", "lm_head.weight"] == "averaged by rule 1 (linear), all; resized to 65x16 by token"
    assert told["a", "model.embed_tokens.weight"].endswith("resized to 65x16 by token")


def make_model_with(rows: int) -> Any:
    from support.tiny_models import make_model

    return make_model(vocab_size=rows, num_hidden_layers=3)


def test_a_tensor_that_the_architecture_leaves_out_is_an_error(tmp_path: Path) -> None:
    tiny = make_pool(tmp_path, "qwen3_moe")
    file = Path(tiny.models["b"]) / "model.safetensors"
    tensors = load_file(file)
    from transformers import Qwen3MoeForCausalLM

    def rewritten(**more: torch.Tensor) -> None:
        save_file({**tensors, **more}, file, {"format": "pt"})

    rewritten(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert tiny.load().models["b"]
    told = fates(tiny.recipe(), tiny)
    assert told["b", "model.layers.0.self_attn.rotary_emb.inv_freq"] == "left out, as the configuration gives it anew"
    rewritten(**{"mtp.layers.0.weight": torch.ones(2, 2), "mtp.norm.weight": torch.ones(2)})
    patterns = Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected
    try:  # as the architectures with such layers have it
        Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected = ["^mtp.*"]
        with pytest.raises(UserError, match=r"models.b: tensor mtp.layers.0.weight of \S+ and 1 more would be lost"):
            tiny.load()
    finally:
        Qwen3MoeForCausalLM._keys_to_ignore_on_load_unexpected = patterns


@pytest.mark.parametrize("architecture", sorted(VISION))
def test_the_language_model_is_merged_and_the_tower_copied(architecture: str, tmp_path: Path) -> None:
    tiny = vision_pool(tmp_path / "pool", architecture)
    recipe = tiny.recipe(Rule(method="linear", parameters={"weight": [0.25, 0.75]}), out_dtype="float32")
    (Path(tiny.base) / "preprocessor_config.json").write_text('{"size": 16}')
    notes = merge_recipe(recipe, tmp_path / "out", device="cpu")
    assert any(note.startswith("tensors copied, as no rule names towers: ") for note in notes)
    base, a, b, out = (file_tensors(f) for f in (tiny.base, *tiny.models.values(), tmp_path / "out"))
    assert out.keys() == base.keys()
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 16}'
    pool = tiny.load()
    towers = {info.name for info in pool.form.layout.infos if info.component == "tower"}
    assert towers == {name for name in base if "vis" in name or "projector" in name}
    assert {info.name for info in pool.infos} == base.keys() - towers
    for name, tensor in out.items():
        if name in towers:
            assert same_bits(tensor, base[name])
        else:
            assert torch.allclose(tensor, 0.25 * a[name] + 0.75 * b[name], atol=1e-6)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "tensors.csv").read_text())))
    assert len(lines) == 3 * len(base)
    assert {row["component"] for row in lines if row["tensor"] in towers} == {"tower"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    engine = Engine(pool, "float32")
    engine.load(recipe)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(engine.model(tokens).logits, again(tokens).logits)
    named = tiny.recipe(Rule(components=("tower",), method="task_arithmetic"), Rule(method="linear"))
    merged = [job for job in plan(named, pool) if job.info.component == "tower"]
    assert {job.step.method.name for job in merged} == {"task_arithmetic"}
    engine.load(named)
    live = engine.pool.form.layout.views(engine.model.state_dict())
    name = min(towers)
    assert torch.allclose(live[name], a[name] + b[name] - base[name], atol=1e-5)
    stacked = tiny.recipe(Rule(method="passthrough"), stack=({"a": (0, 1)}, {"a": (1, 1)}))
    engine.load(stacked)
    lm = RememberingLM(engine.model, pool.tokenizer, 2)
    asked = [Instance("loglikelihood", {}, ("w1 w2", f" w{number}"), number) for number in range(3)]
    assert all(torch.isfinite(torch.tensor(value)) for value, _ in lm.loglikelihood(asked))
    assert engine.model.config.get_text_config().num_hidden_layers == 3
