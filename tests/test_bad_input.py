"""Every mistake that users make: exit status 2, one sentence with the value and a remedy, nothing written.

The table below is the documentation of what is refused. Each case is a function that makes the mistake in a folder of
its own and returns the command's arguments; its docstring says in words what the mistake is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.commands import QUICKSTART, mergesearch
from support.tiny_models import TinyPool, make_model, make_pool, make_tokenizer, write

Case = Callable[[Path, TinyPool], list[Any]]
CASES: dict[str, tuple[Case, list[str]]] = {}


def case(*parts: str) -> Callable[[Case], Case]:
    """Registers a mistake, with what its sentence must hold: the offending value and the remedy."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = (function, list(parts))
        return function

    return register


def merging(folder: Path, pool: TinyPool, **changes: Any) -> list[Any]:
    """`mergesearch merge` of a recipe over the pool, with top-level keys changed."""
    data = {"base": pool.base, "models": pool.models, "rules": [{"method": "linear"}], "out_dtype": "float32"}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**data, **changes}))
    return ["merge", file, folder / "out"]


def running(folder: Path, *overrides: str) -> list[Any]:
    """`mergesearch run` of the quickstart with overrides."""
    sets = [part for override in overrides for part in ("--set", override)]
    return ["run", QUICKSTART, "--set", f"output={folder / 'run'}", *sets]


def rewrite(model: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = Path(model) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@case("models.a", "'gpt2'", "'llama'", "one architecture")
def different_architectures(folder: Path, pool: TinyPool) -> list[Any]:
    other = write(make_model("gpt2"), folder / "other")
    return merging(folder, pool, models={"a": str(other)})


@case("models.a", "hidden_size", "32", "16", "one size")
def different_hidden_sizes(folder: Path, pool: TinyPool) -> list[Any]:
    other = write(make_model("llama", hidden_size=32), folder / "other")
    return merging(folder, pool, models={"a": str(other)})


@case("models.a", "times the norm of the base", "right base", "allow_unrelated")
def a_different_base(folder: Path, pool: TinyPool) -> list[Any]:
    other = make_model("llama", seed=99)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return merging(folder, pool, models={"a": str(write(other, folder / "other"))})


@case("models.a", "tokenizer", "'w0'", "union")
def different_tokenizers(folder: Path, pool: TinyPool) -> list[Any]:
    make_tokenizer(["x0", *(f"w{i}" for i in range(1, 60))]).save_pretrained(pool.models["a"])
    return merging(folder, pool)


@case("models.a", "lacks", "model.norm.weight", "complete checkpoint")
def a_missing_tensor(folder: Path, pool: TinyPool) -> list[Any]:
    rewrite(pool.models["a"], lambda tensors: tensors.pop("model.norm.weight"))
    return merging(folder, pool)


@case("models.a", "model.extra.weight", "lacks", "architecture")
def an_extra_tensor(folder: Path, pool: TinyPool) -> list[Any]:
    rewrite(pool.models["a"], lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    return merging(folder, pool)


@case("models.a", "model.norm.weight", "17", "16")
def a_misshapen_tensor(folder: Path, pool: TinyPool) -> list[Any]:
    rewrite(pool.models["a"], lambda tensors: tensors.update({"model.norm.weight": torch.zeros(17)}))
    return merging(folder, pool)


@case("models.a", "model.safetensors", "truncated or corrupt", "again")
def a_truncated_file(folder: Path, pool: TinyPool) -> list[Any]:
    file = Path(pool.models["a"]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return merging(folder, pool)


@case("models.a", "model.safetensors", "truncated or corrupt", "again")
def a_corrupt_header(folder: Path, pool: TinyPool) -> list[Any]:
    file = Path(pool.models["a"]) / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    return merging(folder, pool)


@case("models.a", "pickle", "pytorch_model.bin", "safetensors")
def a_pickle_only_checkpoint(folder: Path, pool: TinyPool) -> list[Any]:
    file = Path(pool.models["a"]) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    return merging(folder, pool)


@case("models.a", "quantised", "gptq", "unquantised")
def quantised_weights(folder: Path, pool: TinyPool) -> list[Any]:
    file = Path(pool.models["a"]) / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    return merging(folder, pool)


@case("models.a", "adapter", "base")
def a_lora_for_another_base(folder: Path, pool: TinyPool) -> list[Any]:
    import peft

    other = make_model("llama", hidden_size=32)
    adapted = peft.get_peft_model(other, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    return merging(folder, pool, models={"a": str(folder / "adapter")})


@case("rules.0", "'tise'", "did you mean 'ties'")
def an_unknown_method(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, rules=[{"method": "tise"}])


@case("rules.0", "'densty'", "did you mean 'density'")
def an_unknown_parameter(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, rules=[{"method": "ties", "parameters": {"densty": 0.5}}])


@case("'seeds'", "did you mean 'seed'")
def an_unknown_key_in_a_recipe(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, seeds=3)


@case("'zoo_coed'", "did you mean 'zoo_code'")
def an_unknown_task(folder: Path, pool: TinyPool) -> list[Any]:
    return running(folder, "tasks.0.task=zoo_coed")


@case("'ac'", "zoo_code", "did you mean 'acc'")
def an_unknown_metric(folder: Path, pool: TinyPool) -> list[Any]:
    return running(folder, "tasks.0.metric=ac")


@case("rules.0", "density 1.5", "(0, 1]")
def a_parameter_out_of_its_range(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, rules=[{"method": "ties", "parameters": {"density": 1.5}}])


@case("space", "density", "1.5", "(0, 1]")
def a_range_out_of_range(folder: Path, pool: TinyPool) -> list[Any]:
    return running(folder, "space.density=[0.1, 1.5]")


@case("rules.0", "density 0", "(0, 1]")
def a_density_that_leaves_nothing(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, rules=[{"method": "dare_ties", "parameters": {"density": {"a": 0.0}}}])


@case("zoo_code", "holdout 0.999", "change holdout")
def too_few_documents_to_split(folder: Path, pool: TinyPool) -> list[Any]:
    return running(folder, "holdout=0.999")


@case("another configuration", "search.seed: 1, there 0", "output")
def a_run_folder_with_another_configuration(folder: Path, pool: TinyPool) -> list[Any]:
    from mergesearch import config

    (folder / "run").mkdir()
    settings = config.read(QUICKSTART, [f"output={folder / 'run'}"])
    (folder / "run" / "config.yaml").write_text(settings.to_yaml())
    return running(folder, "search.seed=1")


@case("out", "disk is full", "free space")
def a_full_disk(folder: Path, pool: TinyPool, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mergesearch.engine.streaming._bytes", full)
    return merging(folder, pool)


@case("out", "Permission denied", "folder that can be written")
def no_write_permission(folder: Path, pool: TinyPool, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    make = Path.mkdir

    def refused(self: Path, *arguments: Any, **options: Any) -> None:
        if "out" in self.name:
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    return merging(folder, pool)


@case("cuda:7", "auto or cpu")
def a_device_that_is_not_there(folder: Path, pool: TinyPool) -> list[Any]:
    return [*merging(folder, pool), "--device", "cuda:7"]


@case("'nonsense'", "auto, cpu, cuda")
def a_device_that_is_none(folder: Path, pool: TinyPool) -> list[Any]:
    return [*merging(folder, pool), "--device", "nonsense"]


@case("models.a", "NaN", "again")
def a_parent_with_nan(folder: Path, pool: TinyPool) -> list[Any]:
    rewrite(pool.models["a"], lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    return merging(folder, pool)


@case("models.a", "nobody/nothing", "hub")
def a_hub_id_out_of_reach(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, models={"a": "nobody/nothing"})


@case("zoo:bass", "'bass'", "did you mean 'base'")
def an_unknown_zoo_model(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, models={"a": "zoo:bass"})


@case("no rule", "model.embed_tokens.weight", "neither layers nor components")
def rules_that_leave_tensors_uncovered(folder: Path, pool: TinyPool) -> list[Any]:
    return merging(folder, pool, rules=[{"method": "linear", "components": ["mlp"]}])


@case("exists already", "out", "new folder")
def an_output_that_is_taken(folder: Path, pool: TinyPool) -> list[Any]:
    arguments = merging(folder, pool)
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("important")
    return arguments


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_pool(folder, "llama", models=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, parts = CASES[name]
    shutil.copytree(original, tmp_path / "pool")
    pool = TinyPool(str(tmp_path / "pool" / "base"), {n: str(tmp_path / "pool" / n) for n in ("a", "b")})
    extra = (monkeypatch,) if "monkeypatch" in function.__code__.co_varnames else ()
    arguments = function(tmp_path, pool, *extra)
    before = snapshot(tmp_path)

    done = mergesearch(*arguments)

    assert done.status == 2, done.err
    assert len(done.err.strip().splitlines()) == 1 and "Traceback" not in done.err
    for part in parts:
        assert part in done.err
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in sorted(folder.rglob("*"))}


def test_allow_unrelated_lets_a_different_base_through(original: Path, tmp_path: Path) -> None:
    pool = TinyPool(str(original / "base"), {n: str(original / n) for n in ("a", "b")})
    arguments = a_different_base(tmp_path, pool)
    assert mergesearch(*arguments, "--allow-unrelated").status == 0
