from __future__ import annotations

import numpy as np
import pytest
import torch
from support.soups import TargetLosses

from mergesearch.checkpoints import parameters
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.search.soup.closed_forms import fisher, own_documents, regmean
from mergesearch.search.soup.coefficients import Block, Coefficients

DOCUMENTS = {"a": {"one": [0, 1, 2]}, "b": {"two": [0, 1]}}
ALL = {"one": [0, 1, 2], "two": [0, 1]}
GROUPS = [Block((0, 0), ("attention",)), Block((0, 0)), Block((1, 1))]


class Case:
    def __init__(self, tiny, cells=GROUPS, method="linear"):
        self.pool = tiny.load()
        self.engine = Engine(self.pool, "float32")
        self.coefficients = Coefficients(tiny.recipe(), self.pool.infos, cells, method=method)
        self.losses = TargetLosses(self.engine.model, ALL)

    def alone(self, number):
        whole = Coefficients(self.coefficients.template, self.pool.infos)
        self.engine.load(whole.recipe(np.eye(2)[number][None]))
        return self.engine.model

    def vectors(self, name):
        return [self.pool.models[m].tensors[name] - self.pool.base.tensors[name] for m in "ab"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fisher_is_the_share_of_squared_gradients(tiny_pool, architecture):
    case = Case(tiny_pool(architecture, models=2))
    values = fisher(case.coefficients, case.engine, case.losses, DOCUMENTS, normalize=False)
    wanted = np.zeros((3, 2))
    for number, own in enumerate(DOCUMENTS.values()):
        model = case.alone(number)
        model.get_input_embeddings().padding_idx = None
        for parameter in model.parameters():
            parameter.requires_grad_()
        ((label, ids),) = own.items()
        for document in ids:
            model.zero_grad()
            case.losses.loss({label: [document]})[label].sum().backward()
            for name, parameter in parameters(model).items():
                if isinstance(parameter, torch.nn.Parameter):
                    square = parameter.grad.double().square().sum().item()
                    wanted[case.coefficients.cell_of[name], number] += square / len(ids)
    assert values == pytest.approx(wanted / wanted.sum(1, keepdims=True), rel=1e-4)
    assert case.losses.batch_size == 16


def test_fisher_normalised_over_one_cell_is_the_plain_average(tiny_pool):
    case, told = Case(tiny_pool("llama", models=2), "recipe"), []
    asked = [p.requires_grad for p in case.engine.model.parameters()]
    values = fisher(case.coefficients, case.engine, case.losses, DOCUMENTS, spent=told.append)
    assert values.tolist() == [[0.5, 0.5]] and sum(told) == 3 * 5
    assert all(p.grad is None for p in case.engine.model.parameters())
    assert [p.requires_grad for p in case.engine.model.parameters()] == asked


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_regmean_is_the_least_squares_solution(tiny_pool, architecture, method):
    case = Case(tiny_pool(architecture, models=2), method=method)
    c = case.coefficients
    # so little memory that every layer is a pass of its own
    values = regmean(c, case.engine, case.losses, DOCUMENTS, alpha=1.0, most_bytes=1)
    residuals = {0: [], 1: [], 2: []}
    for number, own in enumerate(DOCUMENTS.values()):
        model, seen = case.alone(number), {}
        for name, module in model.named_modules():
            if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings():
                module.register_forward_pre_hook(lambda _, args, name=name, seen=seen: seen.__setitem__(name, args[0]))
        tokens, _ = next(case.losses.gold_sequences(own))
        with torch.no_grad():
            model(input_ids=tokens)
        for name, inputs in seen.items():
            rows = inputs.reshape(-1, inputs.shape[-1]).double() / tokens.numel() ** 0.5
            vectors = [v.double() if architecture == "gpt2" else v.double().T for v in case.vectors(name + ".weight")]
            outputs = [(rows @ v).reshape(-1).numpy() for v in vectors]
            residuals[c.cell_of[name + ".weight"]].append((np.stack(outputs, 1), outputs[number]))
    for cell, parts in residuals.items():
        a, b = (np.concatenate(part) for part in zip(*parts, strict=True))
        if method == "linear":
            first = np.linalg.lstsq((a[:, :1] - a[:, 1:]), b - a[:, 1], rcond=None)[0][0]
            wanted = [first, 1 - first]
        else:
            wanted = np.linalg.lstsq(a, b, rcond=None)[0]
        assert values[cell] == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_regmean_of_twins_and_of_cells_without_linear_layers(tiny_pool):
    def twins(name, model):
        if name == "b":
            with torch.no_grad():
                for parameter, other in zip(model.parameters(), kept[0].parameters(), strict=True):
                    parameter.copy_(other)
        if name == "a":
            kept.append(model)

    kept = []
    cells = [Block(None, ("attention", "mlp")), Block()]
    case = Case(tiny_pool("llama", models=2, edit=twins), cells, "task_arithmetic")
    values = regmean(case.coefficients, case.engine, case.losses, DOCUMENTS)
    assert values == pytest.approx(np.full((2, 2), 0.5), abs=1e-4)


def test_whose_documents_they_are():
    found = own_documents(
        ALL, {"a": {"one": 1.0, "two": 0.1}, "b": {"one": 0.5, "two": 0.2}, "c": {"one": 0, "two": 0}}
    )
    assert found == {"a": {"one": [0, 1, 2]}, "b": {"two": [0, 1]}, "c": ALL}


def test_a_model_without_documents_is_refused(tiny_pool):
    case = Case(tiny_pool("llama", models=2))
    with pytest.raises(UserError, match="model 'b' has no documents"):
        fisher(case.coefficients, case.engine, case.losses, {"a": {"one": [0]}})
