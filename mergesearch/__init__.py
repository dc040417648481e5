"""mergesearch: search for the best way to merge fine-tuned language models.

Importing the package is quick and loads neither torch nor any other heavy library; each name below is fetched when it
is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergesearch.checkpoints import Pool
    from mergesearch.config import Config
    from mergesearch.engine.live import Engine
    from mergesearch.errors import UserError
    from mergesearch.recipe import Recipe, Rule
    from mergesearch.results.loading import Run, load_run
    from mergesearch.results.record import Record
    from mergesearch.space import SearchSpace

__version__ = "0.2.0.dev0"

_HOMES = {
    "Config": "config",
    "Engine": "engine.live",
    "Pool": "checkpoints",
    "Recipe": "recipe",
    "Record": "results.record",
    "Rule": "recipe",
    "Run": "results.loading",
    "SearchSpace": "space",
    "UserError": "errors",
    "load_run": "results.loading",
}

__all__ = [
    "Config",
    "Engine",
    "Pool",
    "Recipe",
    "Record",
    "Rule",
    "Run",
    "SearchSpace",
    "UserError",
    "__version__",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergesearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergesearch.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
