"""`mergesearch --version`: its version, and those of what decides its figures."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from mergesearch import __version__
from mergesearch.commands.usage import COMMAND

_BELOW = ("torch", "transformers", "lm_eval", "optuna")


def lines() -> list[str]:
    """The version alone, then what it runs on; nothing is imported for it."""
    below = ", ".join(f"{name} {_installed(name)}" for name in _BELOW)
    return [f"{COMMAND} {__version__}", f"Python {platform.python_version()}, {below}"]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
