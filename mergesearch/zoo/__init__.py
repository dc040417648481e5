"""The demo zoo: a base, four models fine-tuned from it, and their lm-eval tasks. See README.md beside this file."""

from __future__ import annotations

from pathlib import Path

from mergesearch.errors import unknown


def folder() -> Path:
    """The zoo's folder: `models/NAME` are checkpoints, `tasks` goes to lm-eval's `--include_path`."""
    return Path(__file__).resolve().parent


def names() -> list[str]:
    """The models' names, the base first, then in alphabetical order."""
    present = sorted(p.parent.name for p in folder().glob("models/*/config.json"))
    return sorted(present, key=lambda name: name != "base")


def path(name: str) -> Path:
    """The checkpoint folder of the model `name`; raises `UserError` for a name that is not in the zoo."""
    if name not in names():
        raise unknown("zoo model", name, names(), f"zoo:{name}")
    return folder() / "models" / name
