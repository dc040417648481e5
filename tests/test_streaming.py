"""Files to files: the same bytes as a candidate built in memory, from parents that are never loaded."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergesearch.checkpoints import new_folder, release, save
from mergesearch.engine import streaming
from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Rule

METADATA = {"mergesearch_recipe_id": "none"}
RULES = (
    Rule(layers=(0, 0), method="ties", parameters={"density": 0.4}),
    Rule(components=("mlp",), method="dare_linear", parameters={"density": 0.6}),
    Rule(components=("attention",), method="slerp", parameters={"t": 0.3}),
    Rule(method="linear", parameters={"weight": [0.7, 0.2]}),
)


def in_memory(recipe, tiny, folder: Path, size: str) -> dict:
    engine = Engine(tiny.load(), recipe.out_dtype)
    engine.load(recipe)
    folder.mkdir()
    save(engine.model, engine.pool.tokenizer, folder, METADATA, size)
    return files(folder)


def streamed(recipe, tiny, folder: Path, size: str) -> dict:
    pool = tiny.load(residency="mapped")
    assert streaming.can_stream(recipe, pool)
    folder.mkdir()
    streaming.stream(recipe, pool, folder, METADATA, size)
    return files(folder)


def files(folder: Path) -> dict:
    weights = {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
    return {"weights": weights, "rest": {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in weights}}


@pytest.mark.parametrize(
    ("architecture", "dtype", "options", "size"),
    [
        ("llama", "bfloat16", {"num_hidden_layers": 11}, "8KB"),
        ("llama", "bfloat16", {"tie_word_embeddings": True}, "5GB"),
        ("gpt2", "float32", {}, "8KB"),
    ],
)
def test_streamed_files_equal_saved_ones(tiny_pool, tmp_path, architecture, dtype, options, size):
    tiny = tiny_pool(architecture, dtype=dtype, **options)
    recipe = tiny.recipe(*RULES, out_dtype="bfloat16")
    wanted, got = in_memory(recipe, tiny, tmp_path / "a", size), streamed(recipe, tiny, tmp_path / "b", size)
    assert got["rest"].keys() == wanted["rest"].keys()
    assert [n for n in wanted["rest"] if wanted["rest"][n] != got["rest"][n]] == []
    assert {f: list(w) for f, w in sorted(got["weights"].items())}.keys() == wanted["weights"].keys()
    for file, tensors in wanted["weights"].items():
        assert tensors.keys() == got["weights"][file].keys()
        for name, tensor in tensors.items():
            other = got["weights"][file][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other, tensor), name


def test_mapped_parents_make_the_same_candidates(tiny_pool):
    tiny = tiny_pool("llama", dtype="bfloat16")
    recipe = tiny.recipe(*RULES, out_dtype="bfloat16")
    models = []
    for residency in ("device", "pinned", "mapped"):
        engine = Engine(tiny.load(residency=residency), "bfloat16")
        engine.load(recipe)
        models.append(engine.model.state_dict())
    for other in models[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in models[0].items())


def test_nothing_is_lost_by_releasing(tmp_path):
    tensor = torch.arange(50_000, dtype=torch.float32)
    release([tensor])
    assert torch.equal(tensor, torch.arange(50_000, dtype=torch.float32))


def test_a_failed_write_leaves_nothing(tiny_pool, tmp_path, monkeypatch):
    tiny = tiny_pool("llama", dtype="bfloat16")
    recipe = tiny.recipe(*RULES, out_dtype="bfloat16")
    pool = tiny.load(residency="mapped")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streaming, "_bytes", full)
    with pytest.raises(UserError, match="disk is full"), new_folder(tmp_path / "out") as folder:
        streaming.stream(recipe, pool, folder, METADATA)
    assert list(tmp_path.glob("*out*")) == []


def test_a_merge_with_nan_leaves_nothing(tiny_pool, tmp_path):
    tiny = tiny_pool("llama", dtype="bfloat16")
    recipe = tiny.recipe(Rule(method="linear", parameters={"weight": 3e38, "normalize": False}), out_dtype="float16")
    pool = tiny.load(residency="mapped")
    with pytest.raises(CandidateError, match="NaN or infinity"), new_folder(tmp_path / "out") as folder:
        streaming.stream(recipe, pool, folder, METADATA)
    assert list(tmp_path.glob("*out*")) == []


KILLED = """
    import os, sys, pickle
    from pathlib import Path
    from mergesearch.engine import streaming
    from mergesearch.checkpoints import Pool, new_folder
    from mergesearch.recipe import Recipe, Rule
    base, models, out = {base!r}, {models!r}, Path({out!r})
    recipe = Recipe(base=base, models=models, rules=(Rule(method="linear"),), out_dtype="bfloat16")
    pool = Pool.load(base, models, device="cpu", residency="mapped")
    merge, count = streaming._merge, iter(range(5))
    def dying(*args):
        return merge(*args) if next(count, None) is not None else os._exit(9)
    streaming._merge = dying
    with new_folder(out) as folder:
        streaming.stream(recipe, pool, folder, {{}})
"""


def test_killed_in_the_middle_leaves_no_file_under_the_final_name(tiny_pool, tmp_path):
    tiny = tiny_pool("llama", dtype="bfloat16")
    code = textwrap.dedent(KILLED).format(base=tiny.base, models=tiny.models, out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()[-500:]
    assert not (tmp_path / "out").exists()
