"""What a learner begins with, and what it divides losses by; what it learns is test_learned_soup.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
from support.searches import Engine, Scorer, settings

from mergesearch.engine.live import Engine as LiveEngine
from mergesearch.evaluate.losses import Losses
from mergesearch.evaluate.scores import TaskScore
from mergesearch.evaluate.scoring import Scorer as LiveScorer
from mergesearch.recipe import TensorInfo
from mergesearch.search.history import History
from mergesearch.search.objective import Objective, Scale
from mergesearch.search.soup import learner as module
from mergesearch.search.soup.coefficients import Block, Coefficients
from mergesearch.search.soup.learner import Learner
from mergesearch.search.soup.learning import StateFile
from mergesearch.search.work import Work

INFOS = [TensorInfo(f"layers.{layer}.mlp{n}", layer, "mlp", (2, 2)) for layer in range(2) for n in range(6)]


def begin(folder: Path, **changes: Any) -> Learner:
    engine, scorer = cast(LiveEngine, Engine()), cast(LiveScorer, Scorer(Engine()))
    return Learner(settings(folder, **changes), engine, scorer, INFOS, 2, {"quiz": [0, 1]})


def past(scores: Mapping[str, TaskScore], unit: float, study: Any = None) -> History:
    objective = Objective({"quiz": 1.0}, {"quiz": Scale(0.0, unit)})
    known = {name: {"quiz": score} for name, score in scores.items()}
    return cast(History, SimpleNamespace(objective=objective, scores=lambda name: known.get(name, {}), study=study))


def test_a_soup_that_is_learned_on_and_kept_is_the_same_recipe(tmp_path: Path) -> None:
    """To the last bit, though a mean of equal numbers need not be that number: else it would be scored again."""
    learner, rng = begin(tmp_path / "run"), np.random.default_rng(1)
    coefficients = Coefficients(learner.config.average, INFOS, [Block((0, 0)), Block((1, 1))], above=[])
    for _ in range(20):
        recipe = coefficients.recipe(rng.random(coefficients.shape))
        assert coefficients.recipe(learner.start(coefficients, recipe)).id == recipe.id


def test_a_loss_in_nats_is_not_measured_by_a_perplexity(tmp_path: Path) -> None:
    learner = begin(tmp_path / "run")
    scores = {name: TaskScore(40.0, 1.0, 100, "perplexity", higher_is_better=False, gold=0.1) for name in ("base", "a")}
    assert learner._unit("quiz", past(scores, 20.0)) is None
    scores = {name: TaskScore(0.5, 0.1, 100, "acc", gold=gold) for name, gold in (("base", 0.1), ("a", 0.6))}
    assert learner._unit("quiz", past(scores, 0.3)) == pytest.approx(0.5)


def test_what_losses_are_divided_by_is_measured_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is started again: the documents that it costs would be missing in the search."""
    asked: list[str] = []

    def measured(coefficients: Any, engine: Any, losses: Any, documents: Mapping[str, Any], spent: Any) -> Any:
        asked.extend(documents)
        spent(7)
        spent(3)
        return {label: 2.5 for label in documents}

    monkeypatch.setattr(module, "parent_scales", measured)
    learner = begin(tmp_path / "run")
    study = optuna.create_study()
    losses, coefficients = cast(Losses, SimpleNamespace(kind="cross_entropy")), cast(Coefficients, None)
    key: dict[str, Any] = {}

    def scales(each: Learner) -> tuple[Any, int]:
        told: list[int] = []
        work = Work(past({}, 1.0, study), tmp_path / "state", told.append, lambda: False, key.update, dict(key))
        return each._scales(losses, coefficients, {"quiz": [0]}, work), sum(told)

    assert scales(learner) == ({"quiz": 2.5}, 10)
    # the trial that paid for them is taken up again: it tells anew what it cost, though nothing is measured anew
    assert scales(begin(tmp_path / "run")) == ({"quiz": 2.5}, 10)
    assert asked == ["quiz"]
    key.clear()
    assert scales(learner) == ({"quiz": 2.5}, 0)


@pytest.mark.parametrize("kept", ["{}", "half a file", '{"identity": "of another version", "scores": []}'])
def test_a_soup_whose_state_does_not_fit_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """The run was stopped, and the program is another one by now: the soup is not lost with it."""
    found, said = SimpleNamespace(recipe="found"), []

    def learn(*args: Any, state: Path, **options: Any) -> Any:
        assert StateFile(state, "of this version").load() is None
        return found

    monkeypatch.setattr(module, "learn", learn)
    learner = begin(tmp_path / "run", search={"learned_soup": {"optimizer": "cmaes"}})
    learner.say = said.append
    state = tmp_path / "state.json"
    state.write_text(kept)
    work = Work(past({}, 1.0), state, lambda count: None, lambda: False, lambda key: None)
    assert learner.learn("recipe", None, None, work) == "found"
    assert len(said) == 1 and "begins anew" in said[0] and not state.exists()
