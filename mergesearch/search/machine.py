"""The machine and the versions that a trial was scored with, for the record."""

from __future__ import annotations

import importlib.metadata
import platform

LIBRARIES = ("mergesearch", "torch", "transformers", "lm_eval", "optuna")


def machine(device: str) -> dict[str, str]:
    """The device and the versions that a score was measured with."""
    versions = {name: _version(name) for name in LIBRARIES}
    return {"device": device, "python": platform.python_version(), **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
