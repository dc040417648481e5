"""The demo zoo: a base, four LoRA adapters trained on it, and their lm-eval tasks. See README.md beside this file."""

from __future__ import annotations

from pathlib import Path

from mergesearch.errors import unknown


def folder() -> Path:
    """The zoo's folder: `models/NAME` are a checkpoint and adapters, `tasks` goes to lm-eval's `--include_path`."""
    return Path(__file__).resolve().parent


def names() -> list[str]:
    """The models' names, the base first, then in alphabetical order."""
    found = (
        file.parent.name for kind in ("config", "adapter_config") for file in folder().glob(f"models/*/{kind}.json")
    )
    return sorted(found, key=lambda name: (name != "base", name))


def path(name: str) -> Path:
    """The checkpoint or adapter folder of the model `name`; raises `UserError` for a name that is not in the zoo."""
    if name not in names():
        raise unknown("zoo model", name, names(), f"zoo:{name}")
    return folder() / "models" / name
