"""RegMean, RegMean++ and Fisher averaging in full: the methods, what is measured for them, and recipes that name it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import contract
from support.soups import TargetLosses
from torch import Tensor

from mergesearch import methods
from mergesearch.checkpoints import parameters
from mergesearch.checkpoints.digests import file_digest
from mergesearch.checkpoints.measured import INDEX, MeasuredFiles, in_words, write_measured
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import check, merge, plan
from mergesearch.errors import UserError
from mergesearch.methods import Method
from mergesearch.recipe import Measured, Recipe, single_rule
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.foreseen import Sizes
from mergesearch.search.soup.full import measure_fisher, measure_inputs, measure_merged_inputs

DOCUMENTS = {"a": {"one": [0, 1, 2]}, "b": {"two": [0, 1]}}
ALL = {"one": [0, 1, 2], "two": [0, 1]}


# --- methods ------------------------------------------------------------------------------------------------------


def given(method: Method, models: list[Tensor]) -> list[Tensor]:
    """What the method goes by, made of the models themselves, so that it moves with them."""
    if method.data == "squares":
        return [m.double().square() + 0.1 for m in models]
    return [m.double().T @ m.double() if m.ndim == 2 else m for m in models]


def informed(method: Method) -> Method:
    """The method with statistics made of its models, so that it is called as any other."""

    def function(base: Tensor, models: list[Tensor], **named: Any) -> Tensor:
        return method.function(base, models, statistics=given(method, models), **named)

    function.__doc__ = method.function.__doc__
    return dataclasses.replace(method, function=function, data=None)


@pytest.mark.parametrize("name", methods.data_names())
@pytest.mark.parametrize("check_", sorted(contract.CHECKS))
def test_the_contract(name: str, check_: str) -> None:
    contract.CHECKS[check_](informed(methods.get(name)))


def operands(shape: tuple[int, int], count: int = 3) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, models, and their inputs, [tokens, inputs]."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    models = [base + 0.2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return base, models, [torch.randn(40, shape[1], generator=g, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("turned", [False, True])
def test_regmean_is_the_least_squares_solution(turned: bool) -> None:
    """sum_i w_i |X_i (W - W_i)^T|^2 is least, by numpy's own solver; GPT-2's weights lie the other way round."""
    base, models, inputs = operands((6, 8))
    weights = [0.5, 1.0, 0.2]
    rows = torch.cat([x * w**0.5 for x, w in zip(inputs, weights, strict=True)])
    wanted = torch.cat([x @ m.T * w**0.5 for x, m, w in zip(inputs, models, weights, strict=True)])
    best = torch.linalg.lstsq(rows, wanted).solution.T
    grams = [x.T @ x for x in inputs]
    if turned:
        base, models, grams = base.T.contiguous(), [m.T.contiguous() for m in models], [g[None] for g in grams]
    method = methods.get("regmean")
    complete = method.complete({"weight": weights, "alpha": 1.0}, ["a", "b", "c"], "the test")
    merged = method(base, models, complete, None, grams)
    torch.testing.assert_close(merged.T if turned else merged, best, rtol=1e-4, atol=1e-5)


def test_regmean_shrinks_what_is_off_the_diagonal() -> None:
    base, models, inputs = operands((6, 8))
    grams = [x.T @ x for x in inputs]
    none = methods.get("regmean").complete({"alpha": 0.0, "lambda": 0.5}, ["a", "b", "c"], "the test")
    merged = methods.get("regmean")(base, models, none, None, grams)
    diagonals = [g.diagonal() for g in grams]
    mean = sum((m - base) * d for m, d in zip(models, diagonals, strict=True)) / sum(diagonals)
    torch.testing.assert_close(merged, base + 0.5 * mean, rtol=1e-4, atol=1e-6)


def test_fisher_weighs_every_element() -> None:
    base, models, _ = operands((6, 8))
    fishers = [m.square() for m in models]
    fishers[0][0], fishers[1][0], fishers[2][0] = 0, 0, 0
    complete = methods.get("fisher").complete({"weight": [1.0, 2.0, 0.5]}, ["a", "b", "c"], "the test")
    merged = methods.get("fisher")(base, models, complete, None, fishers)
    shares = [w * f for w, f in zip((1.0, 2.0, 0.5), fishers, strict=True)]
    wanted = sum(s * m for s, m in zip(shares, models, strict=True)) / sum(shares)
    torch.testing.assert_close(merged[1:], wanted[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged[0], (sum(models) / 3)[0], rtol=1e-12, atol=1e-12)


def test_without_statistics_of_a_tensor_it_is_averaged() -> None:
    base, models, _ = operands((6, 8))
    for name in methods.data_names():
        complete = methods.get(name).complete({}, ["a", "b", "c"], "the test")
        merged = methods.get(name)(base, models, complete, None, [None] * 3)
        torch.testing.assert_close(merged, sum(models) / 3)
        with pytest.raises(ValueError, match="goes by statistics"):
            methods.get(name)(base, models, complete)


# --- measuring ----------------------------------------------------------------------------------------------------


class Case:
    def __init__(self, tiny: Any, folder: Path):
        self.tiny, self.folder = tiny, folder
        self.pool = tiny.load()
        self.engine = Engine(self.pool, "float32")
        average = tiny.recipe(*single_rule("linear"))
        self.coefficients = Coefficients(average, self.pool.infos, "tensor", method="linear")
        self.losses = TargetLosses(self.engine.model, ALL)
        self.spent: list[int] = []

    def measured(self, measure: Any, kind: Any = "inputs", **more: Any) -> Measured:
        def write(writer: Any) -> None:
            measure(writer, self.coefficients, self.engine, self.losses, DOCUMENTS, spent=self.spent.append, **more)

        return write_measured(self.folder / "statistics" / "them", kind, DOCUMENTS, write)

    def load(self, weights: dict[str, Tensor]) -> Any:
        """The live model with these weights."""
        with torch.no_grad():
            for name, tensor in parameters(self.engine.model).items():
                tensor.copy_(weights[name])
        return self.engine.model

    def parent(self, name: str) -> dict[str, Tensor]:
        return {n: t.clone() for n, t in self.pool.models[name].live.items()}

    def inputs(self, model: Any, own: dict[str, list[int]]) -> dict[str, Tensor]:
        """X^T X per token of every linear layer, by hooks of the test's own."""
        seen: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name + ".weight", args[0]))
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
        ]
        tokens, _ = next(self.losses.gold_sequences(own))
        with torch.no_grad():
            model(input_ids=tokens)
        for handle in handles:
            handle.remove()
        rows = {n: x.reshape(-1, x.shape[-1]).double() for n, x in seen.items()}
        return {n: x.T @ x / tokens.numel() for n, x in rows.items()}


@pytest.fixture(params=["llama", "gpt2"])
def case(request: Any, tiny_pool: Any, tmp_path: Path) -> Case:
    return Case(tiny_pool(request.param, models=2), tmp_path)


def assert_grams(case: Case, stated: Measured, model: str, wanted: dict[str, Tensor]) -> None:
    for name, gram in wanted.items():
        found = case.pool.measured(stated).get(model, name)
        assert found is not None
        turned = case.pool.base.tensors[name].shape[1] != gram.shape[0] or found.ndim == 3
        assert (found.ndim == 3) == turned
        torch.testing.assert_close((found[0] if turned else found).double(), gram, rtol=1e-4, atol=1e-5)


def test_each_layers_inputs_are_measured(case: Case) -> None:
    # so little memory that every layer is a pass of its own, and then all at once
    for most in (1, 1 << 30):
        stated = case.measured(measure_inputs, most_bytes=most)
        for model, own in DOCUMENTS.items():
            assert_grams(case, stated, model, case.inputs(case.load(case.parent(model)), own))
    assert case.spent[-2:] == [3, 2]
    files = case.pool.measured(stated)
    keys = {tuple(place) for place in files._places["a"].values()}
    # layers that are given the same inputs share one matrix
    assert len(keys) < len(files._places["a"]) or "transformer" in case.pool.form.layout.prefix


def test_what_will_be_kept_is_counted(case: Case) -> None:
    for measure, kind in ((measure_inputs, "inputs"), (measure_fisher, "squares")):
        sizes = Sizes()
        measure(sizes, case.coefficients, case.engine, case.losses, DOCUMENTS)  # type: ignore[arg-type]
        files = case.pool.measured(case.measured(measure, kind))
        held = [file.get_tensor(key) for file in files._files.values() for key in file.keys()]  # noqa: SIM118
        assert sizes.kept == sum(t.nbytes for t in held) > 0


def test_merged_layers_give_the_inputs_of_regmean_plus(case: Case) -> None:
    """Against whole forward passes of a model put together anew for each layer, as the paper has it."""
    stated = case.measured(measure_merged_inputs)
    assert sum(case.spent) == 3 * 5
    prefix = case.pool.form.layout.prefix
    recipe = case.tiny.recipe(*single_rule("regmean"), statistics=stated)
    dtypes = {live: tensor.dtype for live, tensor in case.pool.base.live.items()}
    final = {job.piece.live: tensor for job, tensor in merge(plan(recipe, case.pool), case.pool, 0, dtypes)}
    average = {n: (case.pool.models["a"].live[n] + case.pool.models["b"].live[n]) / 2 for n in case.pool.base.live}
    for layer in range(case.pool.layers):
        for model, own in DOCUMENTS.items():
            weights = {}
            for name in average:
                number = int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None
                below = number is not None and number < layer
                mine = number == layer
                weights[name] = final[name] if below else case.pool.models[model].live[name] if mine else average[name]
            found = case.inputs(case.load(weights), own)
            here = {n: g for n, g in found.items() if n.startswith(f"{prefix}{layer}.")}
            assert here
            assert_grams(case, stated, model, here)


def test_fishers_are_measured_element_by_element(case: Case) -> None:
    stated = case.measured(measure_fisher, "squares")
    assert sum(case.spent) == 3 * 5 and case.losses.batch_size == 16
    for name, own in DOCUMENTS.items():
        model = case.load(case.parent(name))
        model.get_input_embeddings().padding_idx = None
        wanted: dict[str, Tensor] = {}
        for parameter in model.parameters():
            parameter.requires_grad_()
        ((label, ids),) = own.items()
        for document in ids:
            model.zero_grad()
            case.losses.loss({label: [document]})[label].sum().backward()
            for live, parameter in model.named_parameters():
                wanted[live] = wanted.get(live, torch.zeros(())) + parameter.grad.double().square()
        mean = sum(w.sum() for w in wanted.values()) / sum(w.numel() for w in wanted.values())
        for live, fisher in wanted.items():
            found = case.pool.measured(stated).get(name, live)
            assert found is not None
            torch.testing.assert_close(found.double(), fisher / mean, rtol=1e-3, atol=1e-5)


# --- recipes ------------------------------------------------------------------------------------------------------


def test_the_live_model_is_the_plain_definition(case: Case) -> None:
    for measure, kind, method in ((measure_inputs, "inputs", "regmean"), (measure_fisher, "squares", "fisher")):
        stated = case.measured(measure, kind)
        recipe = case.tiny.recipe(*single_rule(method, None, weight={"a": 0.3, "b": 0.8}), statistics=stated)
        average = case.tiny.recipe(*single_rule("linear"))
        assert case.engine.identity(recipe) != case.engine.identity(average)
        for recipe_ in (recipe, average, recipe):
            case.engine.load(recipe_)
            jobs = plan(recipe_, case.pool)
            dtypes = {live: tensor.dtype for live, tensor in case.pool.base.live.items()}
            live = parameters(case.engine.model)
            for job, wanted in merge(jobs, case.pool, 0, dtypes):
                assert torch.equal(job.piece.view(live), wanted), job.info.name
        again = Recipe.from_data(recipe.dump(), "the test")
        assert again == recipe and again.id == recipe.id
        other = recipe.model_copy(update={"statistics": stated.model_copy(update={"sha256": "0" * 64})})
        assert other.id != recipe.id


def test_other_statistics_are_other_candidates(case: Case) -> None:
    """A recipe that names other files is not taken for the one before it, though all parents are the same."""
    one = case.measured(measure_inputs)
    two = case.measured(measure_merged_inputs)
    recipes = [case.tiny.recipe(*single_rule("regmean"), statistics=stated) for stated in (one, two)]
    assert case.engine.identity(recipes[0]) != case.engine.identity(recipes[1])
    weights = []
    for recipe in recipes:
        case.engine.load(recipe)
        weights.append({n: t.clone() for n, t in parameters(case.engine.model).items()})
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_files_that_are_gone_or_others_are_refused(case: Case) -> None:
    stated = case.measured(measure_inputs)
    recipe = case.tiny.recipe(*single_rule("regmean"), statistics=stated)

    def fresh() -> None:
        plan(recipe, pool)[0].operands(pool, 0)
        Engine(pool, "float32").load(recipe)

    folder = Path(stated.folder)
    for file in (folder / "0.safetensors", folder / INDEX):
        pool = case.tiny.load()
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"x")
        with pytest.raises(UserError, match="does not hold the statistics"):
            fresh()
        file.write_bytes(whole)
    told = (folder / INDEX).read_text()
    (folder.parent / "0.safetensors").write_bytes((folder / "0.safetensors").read_bytes())
    (folder / INDEX).write_text(told.replace("0.safetensors", "../0.safetensors"))
    with pytest.raises(UserError, match="does not hold the statistics"):  # though every hash is right
        MeasuredFiles(stated.model_copy(update={"sha256": file_digest(folder / INDEX)}))
    (folder / INDEX).write_text(told)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"statistics.folder .* is not there"):
        fresh()


def test_a_method_without_its_statistics_is_refused(case: Case) -> None:
    stated = case.measured(measure_inputs)
    with pytest.raises(UserError, match=r"rules.0: fisher goes by statistics .* names inputs.*strategies"):
        check(case.tiny.recipe(*single_rule("fisher"), statistics=stated))
    with pytest.raises(UserError, match=r"rules.0: regmean goes by statistics .* names none.*strategies"):
        check(case.tiny.recipe(*single_rule("regmean")))


def test_numbers_are_told_as_ranges() -> None:
    assert in_words([7, 0, 1, 2, 9, 10]) == "0-2, 7, 9-10"
    assert in_words([]) == ""
