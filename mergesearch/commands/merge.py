"""`mergesearch merge`: one recipe merged into a checkpoint."""

from __future__ import annotations

from pathlib import Path

from mergesearch.checkpoints import Pool, check_new_folder, check_shard_size, choose_device, new_folder
from mergesearch.commands.holding import engine_of, merging_of, pool_of, survey_of_recipe
from mergesearch.engine.accounts import accounts, summary
from mergesearch.engine.plan import check
from mergesearch.engine.streaming import stream
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
    survey = survey_of_recipe(recipe, trust_remote_code, weights_alone=True)
    holding, streams = merging_of(recipe, survey, device)
    pool = pool_of(survey, holding, allow_unrelated)
    story = Story(out.name, machine(str(chosen)))
    if not streams:
        write_checkpoint(recipe, engine_of(pool, recipe.out_dtype, holding), out, story, max_shard_size)
        return told(recipe, pool)
    with new_folder(out) as folder:
        stream(recipe, pool, folder, metadata_of(recipe), max_shard_size)
        write_words(recipe, folder, story, pool.notes, pool)
    return told(recipe, pool)


def told(recipe: Recipe, pool: Pool) -> tuple[str, ...]:
    """What a reader of a merge should know: notes, what was decided about the tokenizer, what became of the tensors."""
    fates = [f"tensors {line}" for line in summary(accounts(recipe, pool))]
    return (*(f"note: {note}" for note in pool.notes), f"tokenizer: {pool.tokens}", *fates)
