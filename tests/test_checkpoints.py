"""Reading the base and its models, the refusals, and the way back to disk."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.tiny_models import (
    TinyPool,
    file_tensors,
    fine_tune,
    make_model,
    make_pool,
    make_tokenizer,
    same_bits,
    write,
)
from transformers import AutoModelForCausalLM

from mergesearch import zoo
from mergesearch.checkpoints import (
    Pool,
    choose_device,
    floating_tensors,
    load_model,
    locate,
    new_folder,
    resolve,
    save,
)
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.recipe import Rule
from mergesearch.results.card import Story, write_checkpoint

STORY = Story("a test", {"python": "3"})
WEIGHT = "model.layers.1.mlp.up_proj.weight"
TOKENS = torch.tensor([[3, 5, 7, 11]])


def rewrite(folder: str | Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors in a folder's one safetensors file."""
    tensors = file_tensors(folder)
    change(tensors)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: str | Path, **values: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- what can be read ---------------------------------------------------------------------------------------------


def test_shards_and_one_file_are_the_same(tmp_path: Path) -> None:
    model = make_model()
    for name, size in (("base", "1GB"), ("a", "5KB")):
        write(model, tmp_path / name, max_shard_size=size)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    pool = TinyPool(str(tmp_path / "base"), {"a": str(tmp_path / "a")}).load()
    assert all(same_bits(tensor, pool.base.tensors[name]) for name, tensor in pool.models["a"].tensors.items())


def test_shards_are_written(tmp_path: Path) -> None:
    written = make_pool(tmp_path)
    engine, recipe = Engine(written.load(), "float32"), written.recipe()
    out = write_checkpoint(recipe, engine, tmp_path / "out", STORY, max_shard_size="5KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and (out / "model.safetensors.index.json").is_file()
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["mergesearch_recipe_id"] == recipe.id
    ours = floating_tensors(engine.model)
    assert all(same_bits(ours[name], t) for name, t in AutoModelForCausalLM.from_pretrained(out).state_dict().items())


def test_zoo_models_by_name() -> None:
    for name in zoo.names():
        assert locate(f"zoo:{name}", "models.a").path == zoo.path(name)
    with pytest.raises(UserError, match=r"unknown zoo model 'bass' .* did you mean 'base'"):
        locate("zoo:bass", "models.a")


def test_hub_references_go_through_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = write(make_model(), tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, revision: str | None = None, **options: Any) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in options["allow_patterns"] and "*.bin" not in options["allow_patterns"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name", "models.a") == folder
    assert locate("owner/name@v1.2", "models.a").folder == folder
    assert asked == [("owner/name", None), ("owner/name", "v1.2")]


def test_hub_references_are_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, offline: a branch and a commit that were fetched before."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    write(make_model(), repository / "snapshots" / commit)
    for branch in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    import huggingface_hub._snapshot_download as download

    if "HF_HUB_CACHE" in vars(download):
        monkeypatch.setattr(download, "HF_HUB_CACHE", str(tmp_path))
    for reference in ("owner/name", "owner/name@v2", f"owner/name@{commit}"):
        assert resolve(reference, "models.a").name == commit
    assert Pool.load("owner/name", {"a": "owner/name@v2"}, device="cpu").parameters > 0


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        resolve("nobody/nothing@v3", "models.a")
    said = str(error.value)
    assert said.startswith("models.a: 'nobody/nothing@v3' is no local folder and cannot be fetched from the hub")
    assert said.endswith("or check the name, the revision and the connection") and "\n" not in said


def test_each_parent_keeps_the_dtype_of_its_files(tmp_path: Path) -> None:
    written = make_pool(tmp_path, models=3, dtype=["float32", "bfloat16", "float16", "float32"])
    # what config.json says about the dtype does not decide: the files do
    set_config(written.models["c"], dtype="bfloat16")
    pool = written.load()
    dtypes = {"base": torch.float32, "a": torch.bfloat16, "b": torch.float16, "c": torch.float32}
    for name, dtype in dtypes.items():
        folder = written.base if name == "base" else written.models[name]
        tensors = pool.parent(name).tensors
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert all(same_bits(tensors[n], t) for n, t in file_tensors(folder).items())
    engine = Engine(pool, "float32")
    engine.load(written.recipe(Rule(method="linear")))
    a, b, c = (file_tensors(folder)[WEIGHT].float() for folder in written.models.values())
    torch.testing.assert_close(floating_tensors(engine.model)[WEIGHT], (a + b + c) / 3)


def test_dtypes_mixed_in_one_file(tmp_path: Path) -> None:
    written = make_pool(tmp_path, dtype="bfloat16")
    third = torch.full((16,), 1 / 3)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = third

    rewrite(written.models["a"], widen)
    tensors = written.load().models["a"].tensors
    assert same_bits(tensors["model.norm.weight"], third)
    assert {t.dtype for n, t in tensors.items() if n != "model.norm.weight"} == {torch.bfloat16}
    assert all(same_bits(tensors[n], t) for n, t in file_tensors(written.models["a"]).items())


def test_a_folder_named_twice_is_in_memory_once(tmp_path: Path) -> None:
    written = make_pool(tmp_path)
    again = TinyPool(written.base, {**written.models, "again": written.models["a"], "base_too": written.base})
    pool = again.load()
    assert pool.models["again"].tensors[WEIGHT].data_ptr() == pool.models["a"].tensors[WEIGHT].data_ptr()
    assert pool.models["base_too"].tensors[WEIGHT].data_ptr() == pool.base.tensors[WEIGHT].data_ptr()


@pytest.mark.parametrize("untied", ["base", "a"])
def test_a_tied_head_beside_one_of_its_own(untied: str, tmp_path: Path) -> None:
    """The tied one's head is its embedding; the result has a head of its own."""
    folders = {}
    for seed, name in enumerate(("base", "a")):
        tied = make_model("llama", tie_word_embeddings=True)
        model = make_model("llama", tie_word_embeddings=name != untied)
        model.load_state_dict(tied.state_dict())
        folders[name] = str(write(fine_tune(model, seed) if seed else model, tmp_path / name))
    written = TinyPool(folders["base"], {"a": folders["a"]})
    assert ("lm_head.weight" in file_tensors(folders[untied])) and len(file_tensors(folders["base"])) != len(
        file_tensors(folders["a"])
    )
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    a = file_tensors(folders["a"])
    head = a.get("lm_head.weight", a["model.embed_tokens.weight"])
    assert same_bits(file_tensors(out)["lm_head.weight"], head)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.tie_word_embeddings is False
    assert same_bits(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(folders["a"])(TOKENS).logits)


def test_older_names_in_the_files(tmp_path: Path) -> None:
    """GPT-2 as it lies on the hub: no prefix, and causal masks among the tensors."""
    written = make_pool(tmp_path, "gpt2")

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)

    for folder in (written.base, written.models["a"]):
        rewrite(folder, age)
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert same_bits(model.eval()(TOKENS).logits, engine.model(TOKENS).logits)
    ours, a, b = (file_tensors(f) for f in (out, *written.models.values()))
    name = "h.0.mlp.c_fc.weight"
    merged = ours.get(name, ours.get(f"transformer.{name}"))
    torch.testing.assert_close(merged, (a[name] + b[f"transformer.{name}"]) / 2)


def test_remote_code_needs_leave(tmp_path: Path) -> None:
    written = make_pool(tmp_path)
    for folder in (written.base, *written.models.values()):
        set_config(
            folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, model_type="own"
        )
    with pytest.raises(UserError, match=r"base_model: \S+ brings code of its own .* set trust_remote_code: true"):
        written.load()


# --- refusals -----------------------------------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _garble(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _pickle(folder: Path) -> None:
    torch.save(file_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _int8(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}))


def _float8(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}))


def _shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")


def _lose_a_shard(folder: Path) -> None:
    _shard(folder)
    next(folder.glob("model-00002-*")).unlink()


def _cut_a_shard(folder: Path) -> None:
    _shard(folder)
    file = next(folder.glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-8])


def _wrong_shard(folder: Path) -> None:
    _shard(folder)
    shutil.copy(next(folder.glob("model-00001-*")), next(folder.glob("model-00002-*")))


def _garble_index(folder: Path) -> None:
    _shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def _nan(folder: Path) -> None:
    rewrite(folder, lambda t: t[WEIGHT][3].fill_(float("nan")))


def _infinity(folder: Path) -> None:
    rewrite(folder, lambda t: t[WEIGHT][3].fill_(float("inf")))


def _other_weights(folder: Path) -> None:
    rewrite(folder, lambda t: [x.copy_(torch.randn(x.shape)) for x in t.values()])


def _rows(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config.json: give the folder of a complete"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json cannot be read as JSON .*fetch"),
    "unknown architecture": (
        lambda f: set_config(f, model_type="ohno"),
        r"is a 'ohno' model, the base a 'llama': merge",
    ),
    "another architecture": (
        lambda f: write(make_model("gpt2"), f),
        r"is a 'gpt2' model, the base a 'llama': merge models of one architecture",
    ),
    "another size": (lambda f: write(make_model(hidden_size=32), f), r"hidden_size of \S+ is 32, the base's 16: merge"),
    "another depth": (
        lambda f: write(make_model(num_hidden_layers=3), f),
        r"num_hidden_layers of \S+ is 3, the base's 2: merge models of one size",
    ),
    "other heads": (lambda f: set_config(f, num_attention_heads=2), r"num_attention_heads of \S+ is 2, the base's 4"),
    "biases": (
        lambda f: write(make_model(attention_bias=True), f),
        r"models.a: \S+ has one tensor more than the base, model.layers.0.self_attn.k_proj.bias",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model.safetensors: give the folder"),
    "pickled": (_pickle, r"holds pickled weights alone \(pytorch_model.bin\), which can run code .*convert"),
    "quantised": (
        lambda f: set_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"holds weights quantised by gptq: merge the unquantised",
    ),
    "int8": (_int8, r"holds quantised weights, tensor model.layers.1.mlp.up_proj.weight is I8: merge the unquantised"),
    "float8": (_float8, r"holds quantised weights, tensor \S+ is F8_E4M3: merge the unquantised"),
    "cut in the data": (_cut, r"model.safetensors is truncated or corrupt .*: fetch the file again"),
    "cut in the header": (_cut_header, r"model.safetensors is truncated or corrupt"),
    "garbled header": (_garble, r"model.safetensors is truncated or corrupt"),
    "empty file": (_empty, r"model.safetensors is truncated or corrupt"),
    "missing shard": (_lose_a_shard, r"lacks model-00002-of-\d+.safetensors, which its index names: fetch"),
    "cut shard": (_cut_a_shard, r"model-00002-of-\d+.safetensors is truncated or corrupt"),
    "wrong shard": (_wrong_shard, r"model-00002-of-\d+.safetensors lacks tensor \S+, which its index names"),
    "broken index": (_garble_index, r"index.json cannot be read as JSON"),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop(WEIGHT)),
        r"lacks tensor model.layers.1.mlp.up_proj.weight, which the base has: give a complete",
    ),
    "missing head": (lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")), r"lacks tensor lm_head.weight"),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.1.extra.weight": torch.ones(2)})),
        r"has tensor model.layers.1.extra.weight, which the base lacks",
    ),
    "misshapen tensor": (
        _rows,
        r"tensor model.layers.1.mlp.up_proj.weight of \S+ is 23x16, its config.json makes it 24x16",
    ),
    "nan": (_nan, r"tensor model.layers.1.mlp.up_proj.weight of \S+ holds NaN or infinity: fetch or train"),
    "infinity": (_infinity, r"tensor \S+ of \S+ holds NaN or infinity"),
    "another base": (
        _other_weights,
        r"the task vector of \S+ has \d+\.\d\d times the norm of the base.*allow_unrelated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("whose", ["a", "base"])
def test_damaged_parents(damage: str, whose: str, tmp_path: Path) -> None:
    break_it, said = DAMAGES[damage]
    about_the_model = ("architecture", "size", "depth", "heads", "biases", "another")
    if whose == "base" and any(word in damage for word in about_the_model):
        return  # of two models that differ, the base is taken to be right
    written = make_pool(tmp_path, models=1)
    break_it(Path(written.base if whose == "base" else written.models["a"]))
    with pytest.raises(UserError) as error:
        written.load()
    sentence = str(error.value)
    assert sentence.startswith("base_model: " if whose == "base" else "models.a: "), sentence
    assert str(tmp_path) in sentence and "\n" not in sentence and len(sentence) < 600, sentence
    if whose == "a":
        import re

        assert re.search(said, sentence), sentence


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_one_expert_less(architecture: str, tmp_path: Path) -> None:
    written = make_pool(tmp_path, architecture, models=1)
    name = next(n for n in sorted(file_tensors(written.base)) if "experts.1" in n)
    rewrite(written.models["a"], lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"models.a: .*lacks tensor {name}, which the base has"):
        written.load()
    rewrite(written.base, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=r"base_model: .*: give a complete checkpoint"):
        written.load()


def test_damage_is_found_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergesearch.checkpoints.parents as reading

    def read_model(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(reading, "read_model", read_model)
    for number, damage in enumerate(
        ("missing tensor", "extra tensor", "misshapen tensor", "cut in the data", "pickled")
    ):
        written = make_pool(tmp_path / str(number), models=2)
        DAMAGES[damage][0](Path(written.models["b"]))
        with pytest.raises(UserError, match=r"models.b: "):
            written.load()


def test_another_base_can_be_let_through(tmp_path: Path) -> None:
    written = make_pool(tmp_path, models=1)
    _other_weights(Path(written.models["a"]))
    assert written.load(allow_unrelated=True).models["a"]


def test_what_the_result_takes_from_the_base_is_noted(tmp_path: Path) -> None:
    written = make_pool(tmp_path, models=2)
    set_config(written.models["b"], sliding_window=4, rms_norm_eps=1e-3)
    notes = written.load().notes
    assert len(notes) == 1 and "models.b: its config.json has rms_norm_eps 0.001, the base 1e-06" in notes[0]
    engine = Engine(written.load(), "float32")
    out = write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    assert notes[0] in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("no/such/folder", r"models.a: no folder 'no/such/folder': give a checkpoint folder, a hub id"),
        ("./missing", r"models.a: no folder './missing'"),
        ("nonsense", r"models.a: no folder 'nonsense'"),
        ("FILE", r"models.a: \S+ is a file, not a checkpoint folder: give the folder"),
        ("zoo:nothing", r"unknown zoo model 'nothing'"),
    ],
)
def test_references_to_nothing(reference: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=said):
        locate(reference.replace("FILE", str(tmp_path / "file")), "models.a")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "mps", "cuda:x", "meta"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(UserError, match=f"device is '{device}'.*use auto"):
        choose_device(device)


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="device is 'cuda', but this machine has 0 CUDA devices: use auto or cpu"):
        choose_device("cuda")


def test_one_model_alone(tmp_path: Path) -> None:
    written = make_pool(tmp_path, models=1)
    model = load_model(Path(written.models["a"]), "MODEL")
    assert not model.training
    assert same_bits(floating_tensors(model)[WEIGHT], file_tensors(written.models["a"])[WEIGHT])
    _rows(Path(written.models["a"]))
    with pytest.raises(UserError, match=r"MODEL: tensor \S+ of \S+ is 23x16"):
        load_model(Path(written.models["a"]), "MODEL")


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full .*free space or name a folder elsewhere"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (
            SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
            "name a folder that can",
        ),
    ],
)
def test_a_disk_that_fails_leaves_nothing(failure: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error, new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "half").write_text("x")
        raise failure
    assert str(tmp_path / "deep" / "out") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_during_the_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_utils

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    written = make_pool(tmp_path / "pool")
    engine = Engine(written.load(), "float32")
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_checkpoint(written.recipe(), engine, tmp_path / "out", STORY)
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"cannot write \S+/file/out \(Not a directory\): name a folder"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass

    def denied(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", denied)
    with (
        pytest.raises(UserError, match=r"cannot write \S+/out \(Permission denied\): name a folder that can be"),
        new_folder(tmp_path / "out"),
    ):
        pass


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["file", "folder"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"out exists already: name a new folder"), new_folder(out):
        pass
    assert out.exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "x"]


def test_a_shard_size_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max-shard-size 'many' is no size: write it as 5GB"):
        save(make_model(), make_tokenizer(), tmp_path, {}, "many")


def test_a_generation_config_that_transformers_would_not_write(tmp_path: Path) -> None:
    """Published checkpoints hold settings that contradict each other; they are taken along."""
    written = make_pool(tmp_path, models=1)
    path = Path(written.base) / "generation_config.json"
    odd = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    path.write_text(json.dumps(odd))
    out = write_checkpoint(written.recipe(), Engine(written.load(), "float32"), tmp_path / "out", STORY)
    found = json.loads((out / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"], found["eos_token_id"]) == (0.6, 0.9, odd["eos_token_id"])


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_alone_runs_as_transformers_loads_it(tiny_pool, tmp_path, adapted):
    """In bfloat16 too: the frequencies of the rotary embedding are no weights and keep float32."""
    from mergesearch.checkpoints import load_reference

    made = tiny_pool("llama", dtype="bfloat16")
    reference = made.models["a"]
    if adapted:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        reference = str(tmp_path / "adapter")
    ours, _ = load_reference(reference, made.base, "MODEL", torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(made.base if adapted else reference, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    theirs = dict(plain.named_buffers())
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == theirs[name].dtype and torch.equal(buffer, theirs[name])
