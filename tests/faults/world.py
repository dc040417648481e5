"""A small world to break things in: a base and two models of some thousand parameters, tasks, a run, recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support import evaluate_tiny
from support.tiny_models import fine_tune
from transformers.utils import logging

LIMIT = 6


@dataclass(frozen=True)
class World:
    """Where everything is; nobody writes below `path` once it is made."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """A run as its file states it; `output` is what each case adds."""
        return {
            "name": "small",
            "base_model": str(self.path / "base"),
            "models": self.models,
            "include_path": str(self.path / "tasks"),
            "tasks": [
                {"task": "tiny_choice", "metric": "acc", "limit": LIMIT},
                {"task": "tiny_last", "metric": "acc", "limit": LIMIT},
            ],
            "holdout": 0.3,
            "space": {"methods": ["linear", "ties"]},
            "search": {"strategy": ["baselines", "random"], "defaults": False, "trials": 2},
            "dtype": "float32",
            "device": "cpu",
            "report": {"finalists": 1, "documents": 4},
        }

    @property
    def raced(self) -> dict[str, Any]:
        """A run that learns, races and reports: it keeps more files than the other."""
        search = {
            "strategy": ["baselines", "learned_soup", "study"],
            "defaults": False,
            "trials": 2,
            "sampler": "tpe",
            "learned_soup": {"steps": 3},
        }
        return {**self.config, "racing": {"blocks": 3}, "search": search}

    @property
    def models(self) -> dict[str, str]:
        return {name: str(self.path / name) for name in "ab"}

    @property
    def recipe(self) -> dict[str, Any]:
        rule = {"method": "ties", "parameters": {"weight": [0.6, 0.4], "density": 0.5}}
        return {"base": str(self.path / "base"), "models": self.models, "rules": [rule], "out_dtype": "float32"}

    @property
    def mergekit(self) -> dict[str, Any]:
        """As mergekit states a merge."""
        given = {"weight": 0.5, "density": [0.2, 0.9]}
        return {
            "merge_method": "ties",
            "base_model": str(self.path / "base"),
            "models": [{"model": path, "parameters": given} for path in self.models.values()],
            "parameters": {"normalize": True},
            "dtype": "float32",
        }

    def write(self, name: str, data: Any) -> Path:
        """`data` as the YAML file `name` in the world."""
        file = self.path / name
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        return file


def make(path: Path) -> World:
    """Writes the world below `path`."""
    logging.disable_progress_bar()
    tokenizer = evaluate_tiny.make_tokenizer()
    for number, name in enumerate(("base", "a", "b")):
        model = evaluate_tiny.make_model(0)
        # far enough apart to answer differently
        fine_tune(model, number, 0.1) if number else None
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    evaluate_tiny.write_tasks(path)
    world = World(path)
    world.write("recipe.yaml", world.recipe)
    world.write("mergekit.yaml", world.mergekit)
    return world
