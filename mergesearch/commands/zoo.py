"""`mergesearch zoo`: where the demo models and their tasks are."""

from __future__ import annotations

from typing import Any

from mergesearch import zoo


def folder() -> str:
    """The folder that holds `models` and `tasks`."""
    return str(zoo.folder())


def described() -> dict[str, Any]:
    """What is in it: the models by their references with their folders, the base first, and the tasks' names."""
    return {
        "folder": folder(),
        "models": {f"zoo:{name}": str(zoo.path(name)) for name in zoo.names()},
        "tasks": sorted(path.stem for path in (zoo.folder() / "tasks").glob("*.yaml")),
    }
