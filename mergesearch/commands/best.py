"""`best/` in the run folder: the winner so far as a checkpoint. Workers that end together write it one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mergesearch import leftovers
from mergesearch import recipe as recipes
from mergesearch.commands.story import story_of
from mergesearch.engine.live import Engine
from mergesearch.recipe import Recipe
from mergesearch.results.card import model_card, write_checkpoint
from mergesearch.results.loading import Run, recipe_of
from mergesearch.results.record import Record
from mergesearch.search.store import RunFolder, write_atomically


def refresh_best(folder: RunFolder, engine: Engine, read: Callable[[], Run]) -> Record | None:
    """Exports the best candidate to the run folder, unless it is there already. None where there is none.

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
        if not _holds(folder.best, recipe):
            write_checkpoint(recipe, engine, _fresh(folder), story_of(run, winner))
            _swap(folder)
    return winner


def refresh_card(run: Run, winner: Record) -> None:
    """Writes the model card of the winner in the run folder anew, if it is there."""
    recipe = recipe_of(winner)
    with run.folder.lock("best"):
        if _holds(run.folder.best, recipe):
            write_atomically(run.folder.best / "README.md", model_card(recipe, story_of(run, winner), run.notes))


def _tidy(folder: RunFolder) -> None:
    """Clears away what a killed worker left; a complete checkpoint that was about to take the name takes it."""
    if _fresh(folder).exists() and not folder.best.exists():
        _fresh(folder).replace(folder.best)
    shutil.rmtree(folder.fresh, ignore_errors=True)
    leftovers.clear(folder.path)


def _swap(folder: RunFolder) -> None:
    """Gives the complete checkpoint the name `best`. No system renames a folder over one that is not empty."""
    if folder.best.exists():
        folder.best.replace(folder.fresh / "old")
    _fresh(folder).replace(folder.best)
    shutil.rmtree(folder.fresh, ignore_errors=True)


def _fresh(folder: RunFolder) -> Path:
    """The next `best/`; it has this name only when it is complete."""
    return folder.fresh / "new"


def _holds(checkpoint: Path, recipe: Recipe) -> bool:
    file = checkpoint / "recipe.yaml"
    return file.is_file() and recipes.read(file).id == recipe.id
