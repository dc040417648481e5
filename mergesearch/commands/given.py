"""What the command line of `mergesearch init` says, and what can be said against it before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergesearch.errors import UserError

# the file where neither it nor the run is named
FILE = "mergesearch.yaml"


@dataclass(frozen=True)
class Given:
    """What the command line says of the configuration; the rest is asked for or proposed.

    Attributes:
        models: `NAME=REFERENCE`, or a reference alone, whose name is proposed.
        tasks: `NAME`, or `NAME:METRIC`.
        limit: a number of documents, or `all`.
    """

    base: str | None = None
    models: Sequence[str] = ()
    tasks: Sequence[str] = ()
    include_path: Sequence[str] = ()
    name: str | None = None
    limit: str | None = None
    trials: int | None = None
    hours: float | None = None
    device: str = "auto"
    trust_remote_code: bool = False


def target(file: Path | None, name: str | None, force: bool) -> Path:
    """The file to write.

    Raises:
        UserError: it exists and may not be overwritten, or there is no folder for it.
    """
    path = file or Path(f"{name}.yaml" if name else FILE)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file to write, for example {path / FILE}")
    if path.exists() and not force:
        raise UserError(f"{path} exists already: name another file, or overwrite it with --force")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} in: make it first")
    return path


def missing(given: Given, proposes: bool) -> None:
    """Raises `UserError` for what nobody can be asked for and nothing proposes."""
    of_zoo = (given.base or "").startswith("zoo:")
    needed = {
        "--base": given.base or (proposes and given.models),
        "--model": given.models or (proposes and of_zoo),
        "--task": given.tasks or (proposes and (given.include_path or of_zoo)),
    }
    flags = [flag for flag, there in needed.items() if not there]
    if flags:
        why = "nothing to propose from" if proposes else "no terminal to ask on"
        raise UserError(f"{why}: give {', '.join(flags)} (see `mergesearch init -h`)")
