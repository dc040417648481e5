"""A stand-in for a scorer that is asked block by block, and the settings of searches that race over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.config import Config
from mergesearch.evaluate.blocks import BlockScorer
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.schema import validate
from mergesearch.search.store import RunFolder
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace
from support.searches import INFOS, Engine

SIZE = 120


def quiz(values: np.ndarray, ids: list[int] | None = None) -> dict[str, DocumentScores]:
    return {"quiz": DocumentScores(list(range(len(values))) if ids is None else ids, values, "mean")}


class Live:
    """Scores that depend on the recipe that was loaded last; answers are the values of documents."""

    def __init__(self, engine: Engine, only: list[int] | None = None, answered: dict[int, float] | None = None):
        self.engine, self.ids = engine, list(range(SIZE)) if only is None else only
        self.answered = {} if answered is None else answered
        self.asked: list[tuple[str, int]] = []
        self.stop_at: int | None = None

    def only(self, documents: dict[str, list[int]]) -> Live:
        part = Live(self.engine, documents["quiz"], self.answered)
        part.asked, part.root = self.asked, getattr(self, "root", self)
        return part

    def answer(self) -> None:
        root = getattr(self, "root", self)
        if root.stop_at is not None and len(self.asked) >= root.stop_at:
            raise KeyboardInterrupt
        recipe = self.engine.loaded[-1]
        skill = 0.4 + 0.5 * (int(recipe.id[:4], 16) / 0xFFFF)
        shared = np.random.default_rng(0).random(SIZE)
        for document in self.ids:
            self.asked.append((recipe.id, document))
            self.answered[document] = float(shared[document] < skill)

    def collect(self) -> Scores:
        values = np.array([self.answered[document] for document in self.ids])
        score = TaskScore(float(values.mean()), 0.01, len(values), "acc")
        return Scores({"quiz": score}, quiz(values, self.ids))

    def score(self) -> Scores:
        self.answer()
        return self.collect()

    def answers(self) -> list[list[float]]:
        return [[self.answered[document]] for document in self.ids]

    def restore(self, answers: list[list[float]]) -> None:
        for document, (value,) in zip(self.ids, answers, strict=True):
            self.answered[document] = value


def settings(folder: Path, trials: int = 12, **changes: Any) -> Config:
    data = {
        "name": "test",
        "base_model": "base",
        "models": {"a": "a", "b": "b"},
        "tasks": [{"task": "quiz"}],
        "objective": {"scale": "raw"},
        "space": {"methods": ["linear", "ties"], "layer_groups": 2},
        "search": {"trials": trials, "seed": 3, "strategy": "study", "sampler": "tpe", "defaults": False},
        "output": str(folder),
        "racing": {"blocks": 6},
    }
    return validate(Config, {**data, **changes}, "test")


def start(
    folder: Path, live: Live | None = None, say: Callable[[str], None] = lambda text: None, **changes: Any
) -> Search:
    live = live or Live(Engine())
    read = settings(folder, **changes)
    scorer = BlockScorer(live, {"quiz": list(range(SIZE))}, 6, seed=0)
    space, shape = SearchSpace(read, INFOS, 2), {"infos": INFOS, "layers": 2}
    return Search(read, RunFolder.prepare(read), space, live.engine, scorer, say=say, **shape)
