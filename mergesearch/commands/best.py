"""`best/` in the run folder: the winner so far as a checkpoint. Workers that end together write it one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergesearch import leftovers
from mergesearch.checkpoints.digests import file_digest
from mergesearch.commands.story import story_of
from mergesearch.engine.live import Engine
from mergesearch.recipe import Recipe
from mergesearch.results.card import file_notes, model_card, write_checkpoint
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.record import Record
from mergesearch.search.store import RunFolder, write_atomically

# in `best/`: what was written there, file by file
SEAL, CARD = "digests.json", "README.md"


def refresh_best(folder: RunFolder, engine: Engine, read: Callable[[], Run]) -> Record | None:
    """Exports the best candidate to the run folder, unless it is there already, every file as it was written. None
    where there is none.

    The checkpoint is written beside `best/` and takes its name when it is complete. Whoever else writes `best/` waits.

    Args:
        folder: the run folder.
        engine: builds the candidate.
        read: gives the run as it is by now; called once it is this worker's turn, as another one may have ended a
            better trial meanwhile.
    """
    with folder.lock("best"):
        _tidy(folder)
        run = read()
        winner = run.best()
        if winner is None:
            return None
        recipe = recipe_of(winner)
        if not is_whole(folder.best, recipe):
            try:
                write_checkpoint(recipe, engine, _fresh(folder), story_of(run, winner))
                _seal(_fresh(folder), recipe)
            except BaseException:
                leftovers.discard(folder.fresh)
                raise
            try:
                _swap(folder)
            except BaseException:
                _tidy(folder)
                raise
    return winner


def refresh_card(run: Run, winner: Record) -> None:
    """Writes the model card of the winner in the run folder anew, if it is there."""
    recipe = recipe_of(winner)
    with run.folder.lock("best"):
        if _sealed(run.folder.best).get("recipe") == recipe.id:
            notes = [*run.notes, *file_notes(run.folder.best)]
            write_atomically(run.folder.best / CARD, model_card(recipe, story_of(run, winner), notes))


def is_whole(checkpoint: Path, recipe: Recipe) -> bool:
    """Whether a checkpoint is of a recipe, and every file in it as it was written."""
    seal = _sealed(checkpoint)
    if seal.get("recipe") != recipe.id:
        return False
    try:
        return all(file_digest(checkpoint / name) == said for name, said in seal["sha256"].items())
    except OSError:
        return False


def _tidy(folder: RunFolder) -> None:
    """Clears away what a killed worker left; a complete checkpoint that was about to take the name takes it."""
    if _fresh(folder).exists() and not folder.best.exists():
        _fresh(folder).replace(folder.best)
    leftovers.discard(folder.fresh)
    leftovers.clear(folder.path)


def _swap(folder: RunFolder) -> None:
    """Gives the complete checkpoint the name `best`. No system renames a folder over one that is not empty."""
    if folder.best.exists():
        folder.best.replace(folder.fresh / "old")
    _fresh(folder).replace(folder.best)
    leftovers.discard(folder.fresh)


def _fresh(folder: RunFolder) -> Path:
    """The next `best/`; it has this name only when it is complete."""
    return folder.fresh / "new"


def _seal(checkpoint: Path, recipe: Recipe) -> None:
    """Notes in a checkpoint what was written there. The model card is left out: a report writes it anew."""
    there = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file != checkpoint / CARD)
    files = {file.relative_to(checkpoint).as_posix(): file_digest(file) for file in there}
    write_atomically(checkpoint / SEAL, json.dumps({"recipe": recipe.id, "sha256": files}, indent=1) + "\n")


def _sealed(checkpoint: Path) -> dict[str, Any]:
    """What `_seal` noted; nothing where that is damaged, or the checkpoint is older than seals."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return seal if isinstance(seal, dict) and isinstance(seal.get("sha256"), dict) else {}
