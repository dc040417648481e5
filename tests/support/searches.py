"""Stand-ins for engine and scorer, and the settings of searches over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergesearch.config import Config
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.schema import validate
from mergesearch.search.storage import Patience
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

INFOS = [TensorInfo(f"layers.{i}.mlp", i, "mlp", (2, 2)) for i in range(2)]


class Engine:
    """Notes the recipes it was given; `broken` ids fail, `stop_at` raises KeyboardInterrupt at that call."""

    def __init__(self, broken: Any = lambda recipe: None, stop_at: int | None = None):
        self.loaded: list[Recipe] = []
        self.broken = broken
        self.stop_at = stop_at

    def load(self, recipe: Recipe) -> float:
        if self.stop_at is not None and len(self.loaded) == self.stop_at:
            raise KeyboardInterrupt
        self.loaded.append(recipe)
        error = self.broken(recipe)
        if error:
            raise error
        return 0.25

    def identity(self, recipe: Recipe) -> str:
        return recipe.id


class Found:
    """What `Scorer` returns, in place of `Scores`."""

    def __init__(self, tasks: dict[str, TaskScore]):
        self.tasks, self.seconds = tasks, 0.5

    def save_documents(self, path: Path) -> None:
        path.write_text("documents")


class Scorer:
    """Scores that depend on the loaded recipe alone."""

    def __init__(self, engine: Engine, fail_at: int | None = None):
        self.engine = engine
        self.scored: list[str] = []
        self.fail_at = fail_at

    def score(self) -> Found:
        if self.fail_at is not None and len(self.scored) == self.fail_at:
            self.fail_at = None
            raise KeyboardInterrupt
        recipe = self.engine.loaded[-1]
        self.scored.append(recipe.id)
        digest = hashlib.sha256(recipe.id.encode()).digest()
        return Found({"quiz": TaskScore(digest[0] / 255, 0.01, 10, "acc"), "bits": _bits(digest[1] / 100)})


def _bits(value: float) -> TaskScore:
    return TaskScore(value, 0.02, 10, "bits_per_byte", higher_is_better=False)


def settings(folder: Path, **changes: Any) -> Config:
    data = {
        "name": "test",
        "base_model": "base",
        "models": {"a": "a", "b": "b"},
        "tasks": [{"task": "quiz"}, {"task": "bits"}],
        "space": {"methods": ["linear", "ties", "slerp"], "layer_groups": 2},
        "output": str(folder),
    }
    search = {"trials": 14, "seed": 3, "strategy": "study", "sampler": "tpe", "defaults": False}
    return validate(Config, {**data, **changes, "search": {**search, **changes.get("search", {})}}, "test")


def start(
    folder: Path,
    engine: Engine | None = None,
    scorer: Scorer | None = None,
    patience: Patience | None = None,
    say: Callable[[str], None] = print,
    **changes: Any,
) -> Search:
    """A search over the stand-ins."""
    read = settings(folder, **changes)
    engine = engine or (scorer.engine if scorer else Engine())
    space = SearchSpace(read, INFOS, 2)
    return Search(read, RunFolder.prepare(read), space, engine, scorer or Scorer(engine), patience=patience, say=say)
