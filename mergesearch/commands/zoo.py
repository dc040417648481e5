"""`mergesearch zoo`: where the demo models and their tasks are."""

from __future__ import annotations

from mergesearch import zoo


def folder() -> str:
    """The folder that holds `models` and `tasks`."""
    return str(zoo.folder())
