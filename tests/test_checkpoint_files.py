"""What a checkpoint's index file may name, and what a reference may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import TinyPool, make_model, make_pool, same_bits, write

from mergesearch.checkpoints import Pool, locate
from mergesearch.errors import UserError

INDEX = "model.safetensors.index.json"


def with_shards(folder: Path) -> TinyPool:
    """A base and a model of several files."""
    write(make_model(), folder / "base")
    write(make_model(), folder / "a", max_shard_size="5KB")
    return TinyPool(str(folder / "base"), {"a": str(folder / "a")})


def rename_first(folder: Path, name: Any) -> str:
    """Lets the index give another file for its first tensor; returns what it gave."""
    index = json.loads((folder / INDEX).read_text())
    tensor, before = next(iter(sorted(index["weight_map"].items())))
    index["weight_map"][tensor] = name
    (folder / INDEX).write_text(json.dumps(index))
    return before


@pytest.mark.parametrize("how", ["../outside.safetensors", "absolute", "inside/file.safetensors", "..", "", "x" * 5000])
def test_an_index_names_files_beside_it_alone(how: str, tmp_path: Path) -> None:
    """The file is there, whole and the right one: it is not read all the same."""
    written = with_shards(tmp_path)
    folder = Path(written.models["a"])
    name = str(tmp_path / "outside.safetensors") if how == "absolute" else how
    shard = folder / rename_first(folder, name)
    if name.endswith(".safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=r"models.a: \S+index.json names the file .* only files beside it are read: fe"):
        written.load()


@pytest.mark.parametrize("value", [1, None, 1.5, ["model.safetensors"], {"file": "x"}, True])
def test_what_is_no_name_is_refused(value: Any, tmp_path: Path) -> None:
    written = with_shards(tmp_path)
    rename_first(Path(written.models["a"]), value)
    with pytest.raises(UserError) as error:
        written.load()
    assert f"index.json gives {json.dumps(value)} for tensor" in str(error.value)
    assert str(error.value).endswith("which is no file's name: fetch the checkpoint again")


def test_links_as_the_hub_cache_makes_them_work(tmp_path: Path) -> None:
    """Snapshots are links to blobs elsewhere."""
    written = make_pool(tmp_path, models=1)
    write(make_model(), Path(written.models["a"]), max_shard_size="5KB")
    folder, blobs = Path(written.models["a"]), tmp_path / "blobs"
    (folder / "model.safetensors").unlink()
    before = Pool.load(written.base, written.models, device="cpu").models["a"].tensors
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    after = Pool.load(written.base, written.models, device="cpu").models["a"].tensors
    assert before.keys() == after.keys() and all(same_bits(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    "reference", ["x" * 5000, "owner/" + "x" * 5000, "model+" + "x" * 5000, "~nobody-of-that-name/x"]
)
def test_a_reference_that_no_system_looks_for(reference: str) -> None:
    with pytest.raises(UserError) as error:
        locate(reference, "base_model")
    assert str(error.value).startswith("base_model: ") and "cannot be looked for" in str(error.value)
    assert len(str(error.value)) < 400
