"""What headers alone say of a pool: its form, its sizes, and the same tensors however they are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import TinyPool, fine_tune, make_model, make_pool, make_tokenizer, same_bits, write

from mergesearch.checkpoints import Devices, Pool, Survey, slab_bytes
from mergesearch.checkpoints import mapped as mapping
from mergesearch.checkpoints.lowrank import stored
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import plan
from mergesearch.engine.residency import needs_of
from mergesearch.engine.splitting import dispatch, split
from mergesearch.recipe import Rule

CPU = torch.device("cpu")
PARTS = (torch.device("cpu", 0), torch.device("cpu", 1))


def survey(tiny: TinyPool, tokenizer: str = "base") -> Survey:
    return Survey(tiny.base, tiny.models, False, tokenizer)


def held(pool: Pool) -> int:
    """Bytes of all parents' tensors, shared ones once."""
    parents = (pool.base, *pool.models.values())
    there = stored(t for p in parents for t in p.tensors.values())
    return sum({t.data_ptr(): t.nbytes for t in there if t.numel()}.values())


def adapters(folder: Path, architecture: str, dtype: str, **kinds: dict[str, Any]) -> TinyPool:
    peft = pytest.importorskip("peft")
    base = write(make_model(architecture, dtype=dtype, tie_word_embeddings=True), folder / "base")
    for name, options in kinds.items():
        made = make_model(architecture, dtype=dtype, tie_word_embeddings=True)
        kind = options.pop("kind", peft.LoraConfig)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # peft draws an embedding's factors from the global generator, now and then too large
            adapted = peft.get_peft_model(made, kind(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        adapted.save_pretrained(folder / name)
    return TinyPool(str(base), {name: str(folder / name) for name in kinds})


def shorter(tmp_path: Path) -> TinyPool:
    """A pool whose vocabularies differ, so that embeddings and heads are made anew."""
    write(make_model(), tmp_path / "base")
    more = make_tokenizer([f"w{n}" for n in range(60)] + ["new"])
    write(fine_tune(make_model(), 1), tmp_path / "a", more)
    return TinyPool(str(tmp_path / "base"), {"a": str(tmp_path / "a")})


@pytest.mark.filterwarnings("ignore")
def test_sizes_are_those_of_the_pool_that_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    loras = adapters(
        tmp_path / "lora", "llama", "bfloat16",
        plain={"r": 2, "target_modules": ["q_proj", "down_proj"]},
        saved={"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        embedding={"r": 2, "target_modules": ["embed_tokens"]},
        ia3={"kind": peft.IA3Config, "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    )  # fmt: skip
    experts = adapters(
        tmp_path / "experts", "qwen3_moe", "bfloat16",
        lora={"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    )  # fmt: skip
    mixed = make_pool(tmp_path / "mixed", "qwen3_moe", dtype=("float32", "bfloat16", "float16"))
    for tiny, tokenizer in ((loras, "base"), (experts, "base"), (mixed, "base"), (shorter(tmp_path / "v"), "union")):
        told = survey(tiny, tokenizer)
        needs, read = needs_of(told, torch.float32), Pool.read(told, Devices(CPU))
        assert needs.parents == held(read)
        outline = Pool.outline(told)
        assert [o.shape for o in outline.infos] == [o.shape for o in read.infos]
        assert outline.form.layout == read.form.layout and outline.notes == read.notes
        for name, parent in outline.models.items():
            assert all(t.device.type == "meta" for t in parent.tensors.values())
            real = read.models[name].tensors
            assert {n: (t.shape, t.dtype) for n, t in parent.tensors.items()} == {
                n: (t.shape, t.dtype) for n, t in real.items()
            }
        mapped = Pool.read(survey(tiny, tokenizer), Devices(CPU), "mapped")
        for name, parent in {"base": mapped.base, **mapped.models}.items():
            theirs = read.parent(name).tensors
            assert all(same_bits(tensor, theirs[n]) for n, tensor in parent.tensors.items())
    needs = needs_of(survey(loras), torch.float32)
    assert needs_of(survey(mixed), torch.float32).made == 0 < needs.made < needs.parents
    assert made_anew(shorter(tmp_path / "w")) == needs_of(survey(shorter(tmp_path / "w"), "union"), torch.float32).made


def made_anew(tiny: TinyPool) -> int:
    pool = tiny.load(tokenizer="union")
    parents, by_token = (pool.base, *pool.models.values()), pool.form.layout.by_token
    return sum(tensor.nbytes for p in parents for name, tensor in p.tensors.items() if name in by_token)


def test_plans_need_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_pool(tmp_path, "qwen3_moe")
    outline = Pool.outline(survey(tiny))
    for recipe in (tiny.recipe(), tiny.recipe(stack=({"a": (0, 1)}, {"a": (0, 1), "b": (0, 1)}))):
        told, real = plan(recipe, outline), plan(recipe, tiny.load())
        assert [(job.info, job.parents) for job in told] == [(job.info, job.parents) for job in real]


def test_pinned_parents_share_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch rounds what it pins up to a power of two."""
    monkeypatch.setattr(mapping, "SLAB", 2**14)
    tiny = make_pool(tmp_path, "llama", models=3)
    told = survey(tiny)
    pool, whole = Pool.read(told, Devices(CPU), "pinned"), Pool.read(survey(tiny), Devices(CPU))
    for name, parent in pool.models.items():
        assert all(same_bits(t, whole.models[name].tensors[n]) for n, t in parent.tensors.items())
    parents = (pool.base, *pool.models.values())
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in parents for t in p.tensors.values()}
    assert needs_of(told, torch.float32).pinned == sum(blocks.values()) < 1.25 * held(whole)
    assert slab_bytes([2**13, 2**12, 2**15]) == 2**14 + 2**15


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_moe"])
def test_a_split_candidate_is_merged_where_its_tensors_live(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices that are one CPU: the same bits and the same logits, by way of accelerate's device map."""
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", lambda *_, **__: None)
    tied = {"tie_word_embeddings": True} if architecture == "qwen2" else {}
    tiny = make_pool(tmp_path, architecture, num_hidden_layers=4, **tied)
    told = survey(tiny)
    needs = needs_of(told, torch.float32)
    parts = split(needs.blank, {PARTS[0]: needs.candidate * 8 // 10, PARTS[1]: needs.candidate})
    assert parts is not None and set(parts.values()) == set(PARTS)
    devices = Devices(PARTS[0], parts)
    assert {devices.of(f"model.layers.{n}.mlp.gate.weight") for n in range(4)} == set(PARTS)
    assert split(needs.blank, {PARTS[0]: needs.candidate // 3, PARTS[1]: needs.candidate // 3}) is None
    placed: list[tuple[str, torch.device]] = []
    of = Devices.of
    monkeypatch.setattr(Devices, "of", lambda self, name: (placed.append((name, of(self, name))), of(self, name))[1])
    one, two = Engine(Pool.read(survey(tiny), Devices(CPU)), "float32"), Engine(Pool.read(told, devices), "float32")
    assert {device for _, device in placed} >= set(PARTS)
    tokens = torch.arange(6)[None]
    for recipe in (
        tiny.recipe(Rule(method="ties", parameters={"density": 0.5})),
        tiny.recipe(Rule(method="linear"), stack=({"a": (0, 2)}, {"a": (1, 3), "b": (1, 3)})),
        tiny.recipe(Rule(method="dare_linear", parameters={"density": 0.5}), seed=3),
    ):
        one.load(recipe)
        two.load(recipe)
        ours, theirs = one.model.state_dict(), two.model.state_dict()
        assert all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())
        assert set(two.model.hf_device_map.values()) == {"cpu:0", "cpu:1"}
        with torch.no_grad():
            assert torch.equal(one.model(tokens).logits, two.model(tokens).logits)
    assert dispatch(make_model(), Devices(CPU)).device == CPU


def test_a_stacks_layers_live_where_those_live_that_they_are_like() -> None:
    first, second = PARTS
    devices = Devices(first, {"model.layers.0": first, "model.layers.1": second, "lm_head": second})
    stacked = devices.stacked("model.layers.", (1, 0, 1))
    assert [stacked.of(f"model.layers.{n}.mlp.up_proj.weight") for n in range(3)] == [second, first, second]
    assert stacked.of("lm_head.weight") == second and stacked.of("model.norm.weight") == first
    assert Devices(CPU).map is None and Devices(torch.device("cuda", 1)).map == {"": 1}
