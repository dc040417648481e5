"""mergesearch: search for the best way to merge fine-tuned language models.

Importing the package is quick and loads neither torch nor any other heavy library; each name below is fetched when it
is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Engine": "engine.live",
    "Pool": "checkpoints",
    "Recipe": "recipe",
    "Record": "results.record",
    "Rule": "recipe",
    "SearchSpace": "space",
    "UserError": "errors",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergesearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergesearch.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
