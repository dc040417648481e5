from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
import torch

from mergesearch.checkpoints import parameters
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import plan
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Rule
from mergesearch.search.soup.coefficients import Block, Coefficients, InnerProducts

GROUPS = [Block((0, 0), ("attention",)), Block((0, 0)), Block((1, 1))]
CELLS = {"recipe": "recipe", "group": GROUPS, "tensor": "tensor"}


def in_float64(model):
    """Norms that round to float32 inside would drown the differences."""
    model = model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = types.MethodType(
                lambda self, x: self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon),
                module,
            )
    return model


def loss_of(model):
    tokens = torch.arange(12)[None]  # the padding token among them
    return torch.nn.functional.cross_entropy(model(input_ids=tokens).logits[0, :-1], tokens[0, 1:])


class Case:
    """A tiny pool in float64, merged by the definition."""

    def __init__(self, tiny, cells, method):
        self.pool = tiny.load()
        self.coefficients = Coefficients(tiny.recipe(), self.pool.infos, cells, method=method)
        self.values = np.random.default_rng(0).uniform(0.2, 0.9, self.coefficients.shape)
        recipe = self.coefficients.recipe(self.values)
        engine = Engine(self.pool, "float32")
        engine.load(recipe)
        self.model, self.jobs = in_float64(engine.model), plan(recipe, self.pool)
        self.live = parameters(self.model)
        self.put(self.values)

    @torch.no_grad()
    def put(self, values):
        for job in self.jobs:
            base, *models = (
                self.pool.parent(m).tensors[job.info.name].double() for m in ("base", *self.coefficients.models)
            )
            weights = values[self.coefficients.cell_of[job.info.name]]
            if self.coefficients.method == "linear":
                merged = sum(w * x for w, x in zip(weights, models, strict=True)) / weights.sum()
            else:
                merged = base + sum(w * (x - base) for w, x in zip(weights, models, strict=True))
            job.piece.view(self.live).copy_(merged)

    def gradient(self):
        c = self.coefficients
        with InnerProducts(c.cell_of, c.shape, self.jobs, self.model, self.pool) as products:
            loss_of(self.model).backward()
            products.commit()
            return c.gradient(products.take(), self.values)

    def difference(self, place, step=1e-5):
        found = []
        for sign in (1, -1):
            moved = self.values.copy()
            moved[place] += sign * step
            self.put(moved)
            found.append(loss_of(self.model).item())
        return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_coefficient_against_finite_differences(tiny_pool, architecture, cells, method):
    case = Case(tiny_pool(architecture, models=2, tie_word_embeddings=True), CELLS[cells], method)
    asked = [p.requires_grad for p in case.model.parameters()]
    gradient = case.gradient()
    assert all(p.grad is None for p in case.model.parameters())
    assert [p.requires_grad for p in case.model.parameters()] == asked
    for place in itertools.product(*map(range, gradient.shape)):
        assert gradient[place] == pytest.approx(case.difference(place), rel=1e-3, abs=1e-8), place


def test_fused_weights_count_piece_by_piece(tiny_pool, monkeypatch):
    monkeypatch.setattr("mergesearch.search.soup.coefficients._BLOCK", 40)  # a few rows at a time
    tiny = tiny_pool("mixtral", models=2)
    pool = tiny.load()
    c = Coefficients(tiny.recipe(), pool.infos, "tensor")
    engine = Engine(pool, "float32")
    recipe = c.recipe(c.full(0.4))
    engine.load(recipe)
    jobs = plan(recipe, pool)
    with InnerProducts(c.cell_of, c.shape, jobs, engine.model, pool) as products:
        loss_of(engine.model).backward()
        products.commit()
        found = products.take()
    engine.model.get_input_embeddings().padding_idx = None
    for parameter in engine.model.parameters():
        parameter.requires_grad_()
    loss_of(engine.model).backward()
    live = {name: p.grad.contiguous() for name, p in parameters(engine.model).items()}
    assert len({job.piece.live for job in jobs}) < len(jobs)
    for job in jobs:
        name = job.info.name
        for number, model in enumerate(c.models):
            wanted = (job.piece.view(live) * (pool.models[model].tensors[name] - pool.base.tensors[name])).sum().item()
            assert found[c.cell_of[name], number] == pytest.approx(wanted, rel=1e-3, abs=1e-7)


def test_at_most_one_gradient_is_held(tiny_pool):
    case = Case(tiny_pool("llama", models=2), "recipe", "task_arithmetic")
    held = []
    c = case.coefficients
    with InnerProducts(c.cell_of, c.shape, case.jobs, case.model, case.pool):
        for parameter in case.model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _: held.append(sum(p.grad is not None for p in case.model.parameters()))
            )
        loss_of(case.model).backward()
    assert len(held) == len(list(case.model.parameters())) and max(held) == 0


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_softmax_weights(tiny_pool, method):
    tiny = tiny_pool("llama", models=3)
    c = Coefficients(tiny.recipe(), tiny.load().infos, GROUPS, method=method, parameterisation="softmax")
    start = np.random.default_rng(1).uniform(0.1, 0.5, c.shape)
    if method == "linear":
        start /= start.sum(1, keepdims=True)
    raw = c.raw(start)
    assert np.allclose(c.values(raw), start)
    products = np.random.default_rng(2).normal(size=c.shape)
    found = c.pull_back(products, raw)
    for place in itertools.product(*map(range, raw.shape)):
        ends = []
        for sign in (1, -1):
            moved = raw.clone()
            moved[place] += sign * 1e-6
            ends.append((products * c.values(moved)).sum())
        assert found[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_the_recipe_is_an_ordinary_one(tiny_pool):
    tiny = tiny_pool("llama", models=2)
    pool = tiny.load()
    for cells in CELLS.values():
        c = Coefficients(tiny.recipe(), pool.infos, cells)
        values = np.arange(c.shape[0] * 2).reshape(c.shape) / 7
        recipe = c.recipe(values)
        assert type(recipe).from_data(recipe.dump(), "here").id == recipe.id
        for job in plan(recipe, pool):
            assert list(job.step.parameters["weight"]) == values[c.cell_of[job.info.name]].tolist()


def test_frozen_tensors_belong_to_no_cell(tiny_pool):
    tiny = tiny_pool("llama", models=2)
    pool = tiny.load()
    frozen = Rule(components=("embedding",), method="task_arithmetic", parameters={"weight": 0.0})
    c = Coefficients(tiny.recipe(), pool.infos, "tensor", frozen=[frozen])
    names = {info.name for info in pool.infos if info.component == "embedding"}
    assert names and not names & c.cell_of.keys() and c.shape[0] == len(pool.infos) - len(names)
    engine = Engine(pool, "float32")
    recipe = c.recipe(c.full(0.4))
    engine.load(recipe)
    live = parameters(engine.model)
    jobs = plan(recipe, pool)
    for job in jobs:
        same = torch.equal(job.piece.view(live), pool.base.tensors[job.info.name].float())
        assert same == (job.info.name in names) or job.info.component == "head"
    with InnerProducts(c.cell_of, c.shape, jobs, engine.model, pool) as products:
        loss_of(engine.model).backward()
        products.commit()
    assert np.abs(products.take()).max() > 0


def test_what_is_refused(tiny_pool):
    tiny = tiny_pool("llama", models=2)
    infos = tiny.load().infos
    with pytest.raises(UserError, match="no cell covers"):
        Coefficients(tiny.recipe(), infos, [Block((0, 0))])
    with pytest.raises(UserError, match="has no tensors"):
        Coefficients(tiny.recipe(), infos, [Block(), Block((0, 0))])
    with pytest.raises(UserError, match="does not go with softmax"):
        Coefficients(tiny.recipe(), infos, parameterisation="softmax", low=0)
    with pytest.raises(UserError, match="start above 0"):
        soft = Coefficients(tiny.recipe(), infos, parameterisation="softmax")
        soft.raw(soft.full(0))
    c = Coefficients(tiny.recipe(), infos, method="linear")
    with pytest.raises(CandidateError, match="sum to 0"):
        c.gradient(np.ones((1, 2)), np.array([[1.0, -1.0]]))
    with pytest.raises(ValueError, match="finite"):
        c.recipe(c.full(np.nan))
