"""Which commits of the hub a run's models were read at: read once, the same for every later start and command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergesearch.checkpoints import locate
from mergesearch.config import Config

# where the study notes them: `base_model`, `models.NAME` -> the reference with its commit
REVISIONS = "revisions"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def revisions(config: Config) -> dict[str, str]:
    """The references to models on the hub, each with the commit that was read: `owner/name@commit`.

    What is no hub id (a folder, one of the zoo) is left out.

    Raises:
        UserError: one of them is not there.
    """
    found: dict[str, str] = {}
    for where, reference in _references(config).items():
        source = locate(reference, where)
        if source.folder is not None and source.adapter is not None:
            model, _, adapter = reference.rpartition("+")
            pinned = f"{_pinned(model, source.folder)}+{_pinned(adapter, source.adapter)}"
        else:
            pinned = _pinned(reference, source.path)
        if pinned != reference:
            found[where] = pinned
    return found


def at(config: Config, noted: Mapping[str, str]) -> Config:
    """The configuration with the references that `revisions` gave: what is loaded, not what tells runs apart."""
    models = {name: noted.get(f"models.{name}", reference) for name, reference in config.models.items()}
    return config.model_copy(update={"base_model": noted.get("base_model", config.base_model), "models": models})


def words(noted: Mapping[str, str]) -> list[str]:
    """A line for each model that was read from the hub."""
    return [f"{where} is {reference}, for this run whatever the hub has later" for where, reference in noted.items()]


def _references(config: Config) -> dict[str, str]:
    return {"base_model": config.base_model, **{f"models.{name}": ref for name, ref in config.models.items()}}


def _pinned(reference: str, folder: Path) -> str:
    """A hub id with the commit that its folder in the hub's cache is named by; anything else as it is."""
    commit = folder.name
    if Path(reference).expanduser().exists() or folder.parent.name != "snapshots" or not _COMMIT.fullmatch(commit):
        return reference
    return f"{reference.partition('@')[0]}@{commit}"
