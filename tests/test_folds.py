"""Soups over folds, and weights as a sum of levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.soups import TargetLosses

from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.search.soup.adam import STOPPED, learn
from mergesearch.search.soup.coefficients import Block, Coefficients
from mergesearch.search.soup.folds import learn_by_folds
from mergesearch.search.soup.learning import folds_of, hold_apart, size
from mergesearch.search.soup.settings import SoupSettings
from mergesearch.space.groups import Group

DOCUMENTS = {"one": list(range(12)), "two": list(range(9))}
SETTINGS = SoupSettings(steps=24, learning_rate=0.1, documents=4, look_every=4, folds=3, decay=0.0)
HALVES = [Group((0, 0), "all", None), Group((1, 1), "all", None)]


def bold(name: str, model: Any) -> None:
    if name != "base":
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))


class Case:
    def __init__(self, tiny: Any, cells: Any = "recipe", wanted: Any = (0.7, 0.3), **options: Any):
        pool = tiny.load()
        self.engine = Engine(pool, "float32")
        self.coefficients = Coefficients(tiny.recipe(), pool.infos, cells, **options)
        self.wanted = self.coefficients.full(0) + np.array(wanted)
        self.engine.load(self.coefficients.recipe(self.wanted))
        self.losses: Any = TargetLosses(self.engine.model, DOCUMENTS, sharpness=3.0)

    def folds(self, settings: SoupSettings = SETTINGS, start: float = 0.4, **options: Any) -> Any:
        where = self.coefficients.full(start)
        told = {"seed": 0, "documents": DOCUMENTS, **options}
        return learn_by_folds(self.coefficients, where, self.engine, self.losses, settings, **told)


@pytest.fixture
def tiny(tiny_pool: Any) -> Any:
    return tiny_pool("llama", models=2, edit=bold)


def test_every_document_is_held_out_once() -> None:
    parts = folds_of(DOCUMENTS, 3, 0)
    for label, ids in DOCUMENTS.items():
        assert sorted(n for _, held in parts for n in held[label]) == ids
        for rest, held in parts:
            assert sorted([*rest[label], *held[label]]) == ids and abs(len(held[label]) - len(ids) / 3) < 1
    assert parts != folds_of(DOCUMENTS, 3, 1)
    few = folds_of(DOCUMENTS, 3, 0, 2)
    assert all(len(held[label]) == 2 for _, held in few for label in held)
    assert all(set(held["one"]) <= set(all_held["one"]) for (_, held), (_, all_held) in zip(few, parts, strict=True))
    with pytest.raises(UserError, match="needs 10"):
        folds_of(DOCUMENTS, 10, 0)


def test_the_mean_of_the_folds_finds_the_mix_at_the_stated_cost(tiny: Any) -> None:
    told: list[int] = []
    case = Case(tiny)
    learned = case.folds(spent=told.append)
    assert np.abs(learned.values - case.wanted).max() < 0.1
    assert learned.recipe.id == case.coefficients.recipe(learned.values).id
    assert [look["step"] for look in learned.history] == [0, 4, 8]
    assert learned.history[-1]["validation"] < 0.5 * learned.history[0]["validation"]
    # three looks at every document, and in each of 24 steps a forward and a backward pass of 8 documents
    assert sum(told) == learned.documents == 3 * size(DOCUMENTS) + 24 * 3 * 8
    assert learned.documents <= SETTINGS.cost("expected", 2, [12, 9])
    assert "the mean of 3 folds at step" in learned.note


def test_after_a_stop_it_goes_on_and_ends_the_same(tiny: Any, tmp_path: Any) -> None:
    whole = Case(tiny).folds()
    left = [13]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    part = Case(tiny).folds(state=tmp_path / "7.json", stop=stop)
    assert part.note == STOPPED and len(part.looks) == 3  # of the one fold that was finished
    told: list[int] = []
    again = Case(tiny).folds(state=tmp_path / "7.json", spent=told.append)
    assert again.values.tolist() == whole.values.tolist() and again.history == whole.history
    assert sum(told) == whole.documents == again.documents
    first = Case(tiny).folds(stop=lambda: True)
    assert first.note == STOPPED and first.values.tolist() == Case(tiny).coefficients.full(0.4).tolist()


def test_levels_say_nothing_twice_and_sum_to_the_weights(tiny: Any) -> None:
    case = Case(tiny, "tensor", above=HALVES)
    levels, cells = case.coefficients.levels, case.coefficients.shape[0]
    assert levels is not None and levels.rows == 1 + 2 + cells
    values = np.random.default_rng(0).normal(size=(cells, 2))
    raw = case.coefficients.raw(values)
    assert np.allclose(case.coefficients.values(raw), values)
    assert np.allclose(raw[0].numpy(), values.mean(axis=0))
    # decay leaves the whole model's weights alone
    pulled = case.coefficients.values(case.coefficients.decayed(raw, 0.5))
    assert np.allclose(pulled - raw[0].numpy(), 0.5 * (values - raw[0].numpy()))
    assert np.allclose(levels.shrunk(values, 0.0), values.mean(axis=0))
    # the derivative of a level is the sum of its cells'
    products = np.random.default_rng(1).normal(size=(cells, 2))
    found = case.coefficients.pull_back(products, raw)
    assert np.allclose(found[0].numpy(), products.sum(axis=0)) and np.allclose(found[3:].numpy(), products)
    one = Case(tiny, "recipe", above=[])
    assert one.coefficients.levels is not None and one.coefficients.levels.rows == 1
    halves = Case(tiny, [Block((0, 0)), Block((1, 1))], above=HALVES)
    assert halves.coefficients.levels is not None and halves.coefficients.levels.rows == 3
    kept = Case(tiny, "tensor", above=HALVES, low=0.1, high=0.5).coefficients
    assert kept.values(kept.within(kept.raw(values))).tolist() == pytest.approx(np.clip(values, 0.1, 0.5))


def test_decay_keeps_tensors_together_where_they_should_be(tiny: Any) -> None:
    learn_on, held = hold_apart(DOCUMENTS, 0.25, 0)

    def spread(decay: float) -> float:
        case = Case(tiny, "tensor", above=HALVES)
        settings = SETTINGS.model_copy(update={"decay": decay, "steps": 8, "average": True})
        start = case.coefficients.full(0.4)
        found = learn(
            case.coefficients, start, case.engine, case.losses, settings, seed=0, documents=learn_on, validation=held
        )
        assert found.history[-1]["validation"] < found.history[0]["validation"]
        last = found.looks[-1].values
        return float(np.abs(last - last.mean(axis=0)).max())

    assert spread(5.0) < 0.8 * spread(0.0)
