"""Every common architecture by way of transformers: nothing is dropped, and the candidate is what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import ARCHITECTURES, MOE, TinyPool, file_tensors, make_pool, same_bits

from mergesearch.checkpoints import Pool, constants, floating_tensors
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import DTYPES
from mergesearch.recipe import Rule
from mergesearch.results.card import Story, write_checkpoint

STORY = Story("a test", {"python": "3"})
TIED = ("gemma2", "gemma3_text", "gpt2", "falcon")
EVERYWHERE = {"attention", "norm", "embedding"}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The parents of each architecture and dtype, written and read once."""
    made: dict[tuple[str, str], tuple[TinyPool, Pool]] = {}

    def get(architecture: str, dtype: str = "bfloat16") -> tuple[TinyPool, Pool]:
        if (architecture, dtype) not in made:
            written = make_pool(tmp_path_factory.mktemp(architecture), architecture, dtype=dtype)
            made[architecture, dtype] = (written, written.load())
        return made[architecture, dtype]

    return get


def mixed_rules() -> tuple[Rule, ...]:
    """Masks, thresholds and angles, different ones in each layer."""
    return (
        Rule(layers=(0, 0), components=("attention", "router"), method="slerp", parameters={"t": 0.3}),
        Rule(components=("norm", "embedding"), method="linear"),
        Rule(layers=(1, 1), method="ties", parameters={"density": 0.5}),
        Rule(method="dare_ties", parameters={"density": 0.6}),
    )


def reloaded(folder: Path, dtype: str) -> torch.nn.Module:
    """As a user loads it: no missing, no unexpected key."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((architecture, "bfloat16") for architecture in ARCHITECTURES), *((a, "float32") for a in ("llama", *MOE))],
)
def test_the_candidate_is_the_checkpoint_that_is_exported(
    architecture: str, dtype: str, parents: Any, tmp_path: Path
) -> None:
    written, pool = parents(architecture, dtype)
    engine = Engine(pool, dtype)
    out = write_checkpoint(written.recipe(*mixed_rules(), out_dtype=dtype), engine, tmp_path / "out", STORY)
    model = reloaded(out, dtype)
    live, there = floating_tensors(engine.model), floating_tensors(model)
    assert live.keys() == there.keys()
    assert [name for name in live if not same_bits(live[name], there[name])] == []
    assert {n: t.tolist() for n, t in constants(engine.model).items()} == {
        n: t.tolist() for n, t in constants(model).items()
    }
    tokens = torch.tensor([[3, 5, 7, 11, 13, 2, 4]])
    with torch.no_grad():
        assert same_bits(engine.model(tokens).logits, model(tokens).logits)
    assert (out / "README.md").is_file() and (out / "recipe.yaml").is_file()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_files_keep_the_names_and_shapes_of_the_parents(architecture: str, parents: Any, tmp_path: Path) -> None:
    written, pool = parents(architecture)
    out = write_checkpoint(written.recipe(out_dtype="bfloat16"), Engine(pool, "bfloat16"), tmp_path / "out", STORY)
    theirs, ours = file_tensors(written.base), file_tensors(out)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {info.name: info.shape for info in pool.infos} == {n: tuple(t.shape) for n, t in theirs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_the_parents_takes_part(architecture: str, tmp_path: Path) -> None:
    pool_on_disk = make_pool(tmp_path, architecture)
    pool = pool_on_disk.load()
    engine, recipe = Engine(pool, "float32"), pool_on_disk.recipe()
    views = pool.form.layout.views

    def candidate() -> dict[str, torch.Tensor]:
        engine.load(recipe)
        return {name: tensor.clone() for name, tensor in views(floating_tensors(engine.model)).items()}

    before = candidate()
    assert before.keys() == file_tensors(pool_on_disk.models["a"]).keys()
    for name, tensor in pool.models["a"].tensors.items():
        tensor += 1.0
        after = candidate()
        assert [n for n in before if not same_bits(before[n], after[n])] == [name]
        tensor -= 1.0
        before = candidate()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_average_of_the_files_is_the_average_in_the_files(architecture: str, parents: Any, tmp_path: Path) -> None:
    written, pool = parents(architecture)
    out = write_checkpoint(written.recipe(out_dtype="bfloat16"), Engine(pool, "bfloat16"), tmp_path / "out", STORY)
    a, b, merged = (file_tensors(folder) for folder in (written.models["a"], written.models["b"], out))
    for name, tensor in merged.items():
        expected = (a[name].double() + b[name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_and_components(architecture: str, parents: Any) -> None:
    _, pool = parents(architecture)
    found = {info.component for info in pool.infos}
    inner = {"experts", "router"} if architecture in MOE else {"mlp"}
    assert found == EVERYWHERE | inner | (set() if architecture in TIED else {"head"})
    assert pool.layers == 2
    for info in pool.infos:
        inside = next((int(part) for part in info.name.split(".") if part.isdigit()), None)
        outside = 0 if info.component == "embedding" else 1
        assert info.layer == (outside if inside is None else inside), info
    words = {
        "attention": ("attn", "attention"),
        "mlp": ("mlp",),
        "norm": ("norm", "ln_"),
        "experts": ("expert",),
        "router": ("gate",),
        "head": ("lm_head", "embed_out"),
        "embedding": ("embed", "wte", "wpe"),
    }
    for info in pool.infos:
        assert any(word in info.name for word in words[info.component]), info


@pytest.mark.parametrize("architecture", MOE)
def test_experts_are_merged_one_by_one(architecture: str, tmp_path: Path) -> None:
    """Trimming is per tensor of the files: an expert that moved little keeps the share of one that moved much."""

    def tame(name: str, model: torch.nn.Module) -> None:
        if name == "a":
            for tensor_name, parameter in model.named_parameters():
                if "experts" in tensor_name:
                    with torch.no_grad():
                        parameter[0] += 0.1 * torch.randn(
                            parameter[0].shape, generator=torch.Generator().manual_seed(0)
                        )

    written = make_pool(tmp_path, architecture, models=1, edit=tame)
    pool = written.load()
    engine = Engine(pool, "float32")
    engine.load(written.recipe(Rule(method="ties", parameters={"density": 0.25})))
    merged = pool.form.layout.views(floating_tensors(engine.model))
    experts = [info.name for info in pool.infos if info.component == "experts"]
    assert len(experts) == 2 * 3 * 3
    for name in experts:
        kept = (merged[name] != pool.base.tensors[name]).float().mean().item()
        assert kept == pytest.approx(0.25, abs=0.01), name


def test_tensors_that_are_not_floating_are_copied(tmp_path: Path) -> None:
    from support.tiny_models import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class TableConfig(LlamaConfig):
        model_type = "tiny_table"

    class TableForCausalLM(LlamaForCausalLM):
        config_class = TableConfig

        def __init__(self, config: TableConfig) -> None:
            super().__init__(config)
            for number, layer in enumerate(self.model.layers):
                layer.register_buffer("table", torch.arange(4) + 10 * number)
            self.post_init()

    AutoConfig.register("tiny_table", TableConfig, exist_ok=True)
    AutoModelForCausalLM.register(TableConfig, TableForCausalLM, exist_ok=True)
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(0)
        model = TableForCausalLM(TableConfig(**ARCHITECTURES["llama"]))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.table += 100
            model.lm_head.weight += 0.01 * seed
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    written = TinyPool(str(tmp_path / "base"), {"a": str(tmp_path / "a")})
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    found = file_tensors(out)
    assert found["model.layers.1.table"].tolist() == [110, 111, 112, 113]
    assert found["model.layers.1.table"].dtype == torch.int64
    stacked = written.recipe(Rule(method="passthrough"), stack=({"a": (1, 1)}, {"a": (0, 1)}))
    found = file_tensors(write_checkpoint(stacked, engine, tmp_path / "stacked", STORY))
    assert [found[f"model.layers.{n}.table"][0].item() for n in range(3)] == [110, 100, 110]
