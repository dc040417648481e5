"""`mergesearch run CONFIG --fork NEW`: a run with other models or tasks that takes over what still holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergesearch.commands.foreign import read_config
from mergesearch.errors import UserError
from mergesearch.search.store import RunFolder


def forked(config: Path, overrides: Sequence[str], new: str) -> list[str]:
    """The overrides of a configuration that make it the new run.

    Args:
        config: the file, with the models and tasks that the new run is to have.
        overrides: as for the old run, whose folder they and the file name.
        new: the new run's folder, beside the old one where it is a name alone.

    Raises:
        UserError: there is no old run, or the new one would be the old one.
    """
    old = read_config(config, overrides, lambda text: None).folder
    if not RunFolder(old).path.is_dir():
        raise UserError(f"--fork {new}: there is no run in {old} to begin from: leave --fork out, or set output to it")
    RunFolder.open(old)
    folder = Path(new) if len(Path(new).parts) > 1 else old.parent / new
    if folder.resolve() == old.resolve():
        raise UserError(f"--fork {new} is the run itself: name another folder")
    return [*overrides, f"output={folder}", f"name={folder.name}", f"search.fork={old.resolve()}"]
