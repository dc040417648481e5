"""mergesearch: search for the best way to merge fine-tuned language models.

Importing the package is quick and loads neither torch nor any other heavy library; each name below is fetched when it
is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergesearch.checkpoints import Pool
    from mergesearch.commands.python import OpenedRun, load_run, merge, run_search, score
    from mergesearch.config import Config
    from mergesearch.engine.live import Engine
    from mergesearch.errors import CandidateError, UserError
    from mergesearch.evaluate.scores import Scores
    from mergesearch.recipe import Recipe, Rule
    from mergesearch.results.loading import Run
    from mergesearch.results.record import Record
    from mergesearch.space import SearchSpace

__version__ = "0.2.0"

_HOMES = {
    "CandidateError": "errors",
    "Config": "config",
    "Engine": "engine.live",
    "OpenedRun": "commands.python",
    "Pool": "checkpoints",
    "Recipe": "recipe",
    "Record": "results.record",
    "Rule": "recipe",
    "Run": "results.loading",
    "Scores": "evaluate.scores",
    "SearchSpace": "space",
    "UserError": "errors",
    "load_run": "commands.python",
    "merge": "commands.python",
    "run_search": "commands.python",
    "score": "commands.python",
}

__all__ = [
    "CandidateError",
    "Config",
    "Engine",
    "OpenedRun",
    "Pool",
    "Recipe",
    "Record",
    "Rule",
    "Run",
    "Scores",
    "SearchSpace",
    "UserError",
    "__version__",
    "load_run",
    "merge",
    "run_search",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergesearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergesearch.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
