"""`mergesearch merge`: one recipe merged into a checkpoint."""

from __future__ import annotations

from pathlib import Path

from mergesearch.checkpoints import Residency, check_new_folder, check_shard_size, choose_device, new_folder
from mergesearch.commands.inputs import pool_of
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import check
from mergesearch.engine.streaming import can_stream, stream
from mergesearch.recipe import Recipe
from mergesearch.results.card import Story, metadata_of, write_checkpoint, write_words
from mergesearch.search.worker import machine


def merge_recipe(
    recipe: Recipe,
    out: Path,
    device: str = "auto",
    max_shard_size: str = "5GB",
    allow_unrelated: bool = False,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Builds a checkpoint from a recipe; returns what a reader of the result should know, a sentence each.

    Args:
        recipe: what to merge.
        out: the new folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; on the CPU the result is written tensor by tensor where it can be.
        max_shard_size: of a safetensors file, as `5GB`.
        allow_unrelated: accept models that share no base.
        trust_remote_code: run code from the models' folders.

    Raises:
        UserError: the recipe cannot be merged, or `out` is no new folder.
        CandidateError: the merge came out with NaN or infinity.
    """
    check(recipe)
    check_shard_size(max_shard_size)
    check_new_folder(out)  # before any model is read
    chosen = choose_device(device)
    residency: Residency = "mapped" if chosen.type == "cpu" else "device"
    pool = pool_of(recipe, device, allow_unrelated, trust_remote_code, residency, weights_alone=True)
    story = Story(out.name, machine(str(chosen)))
    if residency != "mapped" or not can_stream(recipe, pool):
        write_checkpoint(recipe, Engine(pool, recipe.out_dtype), out, story, max_shard_size)
        return pool.notes
    with new_folder(out) as folder:
        stream(recipe, pool, folder, metadata_of(recipe), max_shard_size)
        write_words(recipe, folder, story, pool.notes)
    return pool.notes
