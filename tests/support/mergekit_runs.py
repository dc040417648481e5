"""mergekit run over tiny models, as a user would: a file goes in, tensors come out. It is called, never read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mergesearch.checkpoints import Pool
from mergesearch.engine.plan import DTYPES, merge, plan
from mergesearch.recipe import Recipe
from support.tiny_models import TinyPool

LAYERS = 5


def need_mergekit() -> None:
    pytest.importorskip("mergekit", reason="compares with mergekit 0.1.5: install the parity extra")


def filled(text: str, pool: TinyPool) -> str:
    """A file's text with <base>, <a>, <b>, ... replaced by folders."""
    for name, folder in {"base": pool.base, **pool.models}.items():
        text = text.replace(f"<{name}>", folder)
    return text


def ours(recipe: Recipe) -> dict[str, Tensor]:
    """What this package merges, by name."""
    base = recipe.base or next(iter(recipe.models.values()))
    pool = Pool.load(base, recipe.models, device="cpu", allow_unrelated=True)
    jobs = plan(recipe, pool)
    dtypes = {job.piece.live: DTYPES[recipe.out_dtype] for job in jobs}
    return {job.info.name: tensor for job, tensor in merge(jobs, pool, recipe.seed, dtypes)}


def theirs(text: str, out: Path) -> dict[str, Tensor]:
    """What mergekit-yaml writes for a file; `out` is a new folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    cache = str(out.with_name(f"{out.name}-adapters"))
    options = MergeOptions(quiet=True, write_model_card=False, clone_tensors=True, lora_merge_cache=cache)
    run_merge(configuration, str(out), options=options)
    return written(out)


def theirs_multi(text: str, folder: Path) -> dict[str, Tensor]:
    """What mergekit-multi writes for a file of several documents; `folder` is new."""
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main

    folder.mkdir(parents=True)
    (folder / "multi.yaml").write_text(text, encoding="utf-8")
    paths = [str(folder / "multi.yaml"), "-I", str(folder / "parts"), "--out-path", str(folder / "out"), "--quiet"]
    done = CliRunner().invoke(main, paths, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return written(folder / "out")


def written(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """By tensor, in float64; both hold the same tensors of the same dtypes."""
    assert one.keys() == other.keys()
    assert {k: t.dtype for k, t in one.items()} == {k: t.dtype for k, t in other.items()}
    return {name: float((one[name].double() - other[name].double()).abs().max()) for name in one}


def units_apart(one: Tensor, other: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between each pair of elements, int32."""
    return (_place(one) - _place(other)).abs()


def _place(tensor: Tensor) -> Tensor:
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
