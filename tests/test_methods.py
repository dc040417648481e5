"""The registry, the contract over every registered method, and what ARCHITECTURE.md says of single ones."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import optuna
import pytest
import torch
from support import contract
from support.commands import mergesearch

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.methods import adaptive, mask_key, registry, sparse, sphere, task_vector
from mergesearch.recipe import TensorInfo
from mergesearch.schema import validate
from mergesearch.space import SearchSpace

OWN_FILE = '''
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergesearch.methods.common import Weights, per_model
from mergesearch.methods.registry import method


@method(paper="none", family="interpolation", base="unused")
def median_soup(base: Tensor | None, models: Sequence[Tensor], *, weight: Weights = 1.0) -> Tensor:
    """The median of the models, element by element, each counted by its weight.

    weight: any number for each model, 1. Each model: one shape; returns that shape.
    """
    weights = per_model(weight, models)
    order = torch.stack(list(models)).sort(dim=0)
    share = torch.stack([torch.as_tensor(w, dtype=torch.float64) for w in weights])[order.indices].cumsum(0)
    first = (share >= share[-1:] / 2).int().argmax(0, keepdim=True)
    return order.values.gather(0, first).squeeze(0)
'''


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", methods.names())
def test_contract(name, check):
    contract.CHECKS[check](methods.get(name))


def test_a_file_of_its_own_is_enough(own_registry, monkeypatch, tmp_path):
    """A file in the package's folder is found, registered, described, passes the contract; no other file changes."""
    (tmp_path / "median.py").write_text(OWN_FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mergesearch.methods.median", raising=False)
    assert "median_soup" in methods.names()
    assert "median_soup" in [row["name"] for row in methods.describe()]
    assert "median_soup" in mergesearch("methods").out
    for check in contract.CHECKS.values():
        check(methods.get("median_soup"))


def test_a_file_of_its_own_is_in_the_search_space(own_registry, monkeypatch, tmp_path):
    (tmp_path / "median.py").write_text(OWN_FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mergesearch.methods.median", raising=False)
    data = {"base_model": "base", "models": {"a": "a", "b": "b"}, "tasks": [{"task": "quiz"}]}
    config = validate(Config, {**data, "space": {"methods": ["median_soup"]}}, "test")
    space = SearchSpace(config, [TensorInfo("layers.0.mlp", 0, "mlp", (2, 2))], 1)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    recipe = space.suggest(trial)
    assert recipe.methods == ["median_soup"] and space.parameters(recipe) == trial.params
    searched = [p for p in methods.get("median_soup").parameters.values() if p.search is not None]
    assert len(trial.params) >= len(searched)


def test_a_user_module_is_enough(own_registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_FILE.replace("median_soup", "users_soup"))
    spec = importlib.util.spec_from_file_location("mine", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "users_soup" in methods.names()
    contract.CHECKS["finite"](methods.get("users_soup"))


def test_two_methods_of_one_name_are_refused(own_registry):
    with pytest.raises(ValueError, match="'ties'"):

        @methods.method(paper="none", family="interpolation", base="unused")
        def ties(base, models):
            """Nothing."""


def test_a_parameter_without_a_spec_is_refused(own_registry):
    with pytest.raises(TypeError, match="'weight'"):

        @methods.method(paper="none", family="interpolation", base="unused")
        def unspecified(base, models, *, weight: float = 1.0):
            """Nothing."""


def test_names_and_issue_list():
    wanted = (
        "linear slerp nuslerp multislerp karcher nearswap model_stock arcee_fusion task_arithmetic ties dare_linear "
        "dare_ties breadcrumbs breadcrumbs_ties della della_linear sce ram ramplus_tl passthrough uniform_soup"
    )
    assert set(wanted.split()) <= set(methods.names())
    assert methods.names() == sorted(methods.names())


def test_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match=r"'tise' in rules\[1\].*'ties'"):
        methods.get("tise", "rules[1]")


def test_describe_has_every_parameter():
    for row in methods.describe():
        method = methods.get(row["name"])
        assert [p["key"] for p in row["parameters"]] == list(method.parameters)
        assert row["paper"] and row["summary"] and row["models"]


def test_exponents_that_yaml_reads_as_text():
    assert methods.get("karcher").complete({"tol": "1e-7"}, ["a", "b"], "here")["tol"] == 1e-7


def test_whole_numbers():
    complete = methods.get("karcher").complete({"max_iter": 3.0}, ["a", "b"], "here")
    assert complete["max_iter"] == 3 and isinstance(complete["max_iter"], int)


@pytest.mark.parametrize(("name", "defaults"), {
    "linear": {"weight": 1.0, "normalize": True},
    "task_arithmetic": {"weight": 1.0, "lambda": 1.0, "normalize": False},
    "ties": {"normalize": True, "density": 1.0},
    "dare_linear": {"normalize": False, "samples": 1, "rescale": "inverse"},
    "dare_ties": {"normalize": False, "samples": 1, "rescale": "inverse"},
    "breadcrumbs": {"normalize": False, "gamma": 0.01},
    "breadcrumbs_ties": {"normalize": False, "gamma": 0.01},
    "della": {"normalize": True, "epsilon": 0.15},
    "della_linear": {"normalize": False, "epsilon": 0.15},
    "sce": {"normalize": True, "select_topk": 1.0, "weight": 1.0, "lambda": 1.0},
    "ram": {"epsilon": 1e-5, "weight": 1.0, "lambda": 1.0},
    "ramplus_tl": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2, "weight": 1.0, "lambda": 1.0},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "nuslerp": {"flatten": True, "row_wise": False},
    "passthrough": {"scale": 1.0},
}.items())  # fmt: skip
def test_published_defaults(name, defaults):
    assert defaults.items() <= {k: p.default for k, p in methods.get(name).parameters.items()}.items()


TASK_VECTOR = [name for name in methods.names() if methods.get(name).family == "task_vector"]


@pytest.mark.parametrize("name", TASK_VECTOR)
def test_task_vector_family_has_weight_and_lambda(name):
    assert {"weight", "lambda"} <= set(methods.get(name).parameters)


@pytest.mark.parametrize("name", TASK_VECTOR)
def test_lambda_scales_the_merged_task_vector(name):
    """lambda 2 moves twice as far from the base, lambda 0 nowhere."""
    method = methods.get(name)
    base, models = contract.inputs(method, (5, 6), torch.float64)
    one, two, none = (contract.merge(method, base, models, {"lambda": v}) for v in (1.0, 2.0, 0.0))
    torch.testing.assert_close(two - base, 2 * (one - base))
    assert torch.equal(none, base)


def test_skill_transplant_and_negation():
    """weight 1 for the target beside lambda (model - base) of another: target + (model - base), and minus it."""
    method = methods.get("task_arithmetic")
    base, target, skilled = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    for sign in (1.0, -1.0):
        parameters = method.complete({"weight": [1.0, 0.5 * sign]}, ["target", "skilled"], "here")
        merged = method(base, [target, skilled], parameters)
        torch.testing.assert_close(merged, target + 0.5 * sign * (skilled - base))


def vectors(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.29, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 100])
def test_trim_keeps_exactly_k_off_the_ties(n, density):
    d = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double() + 1
    kept = task_vector.trim(d, density)
    k = max(1, int(density * n))
    assert kept.count_nonzero() == k
    assert kept[kept != 0].min() == n - k + 1


def test_trim_keeps_every_tie():
    """Differs from mergekit on purpose: equal magnitudes at the cut all stay, whatever a sort would do."""
    kept = task_vector.trim(vectors([1.0, -2.0, 2.0, 3.0, 2.0]), 0.4)
    assert kept.tolist() == [0.0, -2.0, 2.0, 3.0, 2.0]


def test_election_counts_zero_as_positive_and_zeros_drop_out():
    ties = methods.get("ties")
    base = torch.zeros(3, dtype=torch.float64)
    models = [vectors([1.0, 0.0, -3.0]), vectors([-1.0, 4.0, -1.0])]
    assert ties(base, models, ties.complete({}, ["a", "b"], "here")).tolist() == [1.0, 4.0, -2.0]


def test_divisors_that_vanish_count_as_one():
    base, d = torch.zeros(2, dtype=torch.float64), vectors([1.0, 2.0])
    for name in ("linear", "task_arithmetic"):
        method = methods.get(name)
        given = method.complete({"weight": [1.0, -1.0], "normalize": True}, ["a", "b"], "here")
        assert method(base, [d, 2 * d], given).tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties", "ties"])
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_tiny_tensors_are_never_erased(name, shape):
    method = methods.get(name)
    base, model = torch.zeros(shape), torch.full(shape, 2.0)
    merged = method(base, [model], method.complete({"density": 0.01}, ["a"], "here"))
    assert merged.abs().max() == 2.0


@pytest.mark.parametrize(("density", "gamma", "kept"), [
    (0.5, 0.1, range(5, 10)),
    (0.5, 0.25, range(4, 9)),
    (0.95, 0.2, range(1, 10)),
    (1.0, 0.2, range(1, 11)),
    (0.01, 0.2, range(8, 9)),
])  # fmt: skip
def test_breadcrumbs_keeps_the_middle(density, gamma, kept):
    d = torch.arange(1, 11, dtype=torch.float64)
    assert sparse.trim_both(d, density, gamma).nonzero().flatten().add(1).tolist() == list(kept)


def keys(count, seed=0):
    return [mask_key(seed, f"m{i}", "w") for i in range(count)]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_keep_their_share(name, density):
    """The number kept is within five standard deviations of density n."""
    method = methods.get(name)
    base, model = torch.zeros(200, 500), torch.randn(200, 500, generator=torch.Generator().manual_seed(1))
    merged = method(base, [model], method.complete({"density": density}, ["a"], "here"), keys(1))
    n = model.numel()
    assert abs(merged.count_nonzero().item() - density * n) < 5 * math.sqrt(n * density * (1 - density))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_methods_are_unbiased(name):
    """The mean over 2000 seeds is the task vector, within five standard errors of each element."""
    method = methods.get(name)
    base, model = torch.zeros(4, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    parameters = method.complete({"density": 0.5}, ["a"], "here")
    draws = torch.stack([method(base, [model], parameters, keys(1, seed)) for seed in range(2000)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - model).abs() < 5 * error).all()


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_samples_average_masks(name):
    """More masks, less noise: the squared error falls with their number."""
    method = methods.get(name)
    base, model = torch.zeros(50, 40), torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    errors = []
    for samples in (1, 16):
        given = method.complete({"density": 0.5, "samples": samples, "normalize": False}, ["a"], "here")
        errors.append((method(base, [model], given, keys(1)) - model).square().mean())
    assert 10 < errors[0] / errors[1] < 25


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_l1_rescaling_keeps_the_norm(name):
    method = methods.get(name)
    base, model = torch.zeros(30, 30), torch.randn(30, 30, generator=torch.Generator().manual_seed(4))
    given = method.complete({"density": 0.3, "rescale": "l1"}, ["a"], "here")
    merged = method(base, [model], given, keys(1))
    torch.testing.assert_close(merged.abs().sum(), model.abs().sum())


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.get(n).random])
def test_order_of_work_does_not_matter(name):
    """A tensor's result is the same whatever was merged before it; another seed, model or tensor gives another mask."""
    method = methods.get(name)
    base, models = contract.inputs(method, (20, 30))
    parameters = method.complete({"density": 0.5}, contract.labels(method), "here")

    def one(tensor, seed=0):
        return method(base, models, parameters, [mask_key(seed, m, tensor) for m in contract.labels(method)])

    forwards = {name: one(name) for name in "abc"}
    backwards = {name: one(name) for name in "cba"}
    assert all(torch.equal(forwards[n], backwards[n]) for n in "abc")
    assert not torch.equal(forwards["a"], forwards["b"]) and not torch.equal(one("a"), one("a", seed=1))


def test_della_probabilities_follow_the_rank():
    """Kept shares over 4000 masks are density - epsilon + 2 epsilon rank/(m - 1) within five standard errors."""
    d = vectors([[5.0, 1, 3, 2, 4], [-10, 20, -30, 40, 50]])
    expected = vectors([[0.7, 0.3, 0.5, 0.4, 0.6], [0.3, 0.4, 0.5, 0.6, 0.7]])
    p = sparse.keep_probabilities(sparse.magnitude_ranks(d), 0.5, 0.2)
    torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=1e-6)
    draws = [task_vector.drop(d, p, "none", mask_key(s, "m", "w"), 1) != 0 for s in range(4000)]
    share = torch.stack(draws).double().mean(0)
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_della_ties_share_their_rank():
    """Differs from mergekit on purpose: equal magnitudes have equal probabilities."""
    ranks = sparse.magnitude_ranks(vectors([1.0, -1.0, 1.0, 2.0, 2.0]))
    assert ranks.tolist() == [0.25, 0.25, 0.25, 0.875, 0.875]
    assert sparse.magnitude_ranks(torch.zeros(3, 1)).tolist() == [[0.5]] * 3


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.1, 0.15), (0.95, 0.15), (1.0, 0.5), (0.01, 1.0)])
def test_della_probabilities_stay_possible(density, epsilon):
    """mergekit refuses density +- epsilon outside (0, 1); ours narrows epsilon and keeps the mean."""
    p = sparse.keep_probabilities(sparse.magnitude_ranks(torch.randn(3, 101)), density, epsilon)
    assert p.min() > 0 and p.max() <= 1 + 1e-6
    torch.testing.assert_close(p.double().mean().item(), density, rtol=1e-5, atol=0)


def test_sce_where_nothing_varies_keeps_everything():
    """Differs from mergekit on purpose (it gives the base): equal models are merged to themselves."""
    sce = methods.get("sce")
    base, model = torch.zeros(6), torch.arange(6.0)
    merged = sce(base, [model, model.clone()], sce.complete({"select_topk": 0.5}, ["a", "b"], "here"))
    torch.testing.assert_close(merged, model)


def test_sce_weight_multiplies_its_own():
    sce = methods.get("sce")
    base, a, b = torch.zeros(2, dtype=torch.float64), vectors([3.0, 0.0]), vectors([1.0, 0.0])
    merged = sce(base, [a, b], sce.complete({"weight": [1.0, 3.0]}, ["a", "b"], "here"))
    torch.testing.assert_close(merged, vectors([(0.9 * 3 + 0.1 * 3 * 1) / (0.9 + 0.1 * 3), 0.0]))
    assert [round(float(c), 6) for c in adaptive.energy_shares([a, b])] == [0.9, 0.1]


def test_ram_unique_changes_stay_whole():
    base = torch.zeros(4, dtype=torch.float64)
    models = [vectors([1.0, 2.0, 0.0, 0.0]), vectors([3.0, 0.0, 4.0, 0.0])]
    ram, plus = methods.get("ram"), methods.get("ramplus_tl")
    assert ram(base, models, ram.complete({}, ["a", "b"], "here")).tolist() == [2.0, 2.0, 4.0, 0.0]
    given = plus.complete({"r": 0.5, "alpha": 0.8}, ["a", "b"], "here")
    torch.testing.assert_close(plus(base, models, given), vectors([2.0, 2.0 * 1.4, 4.0 * 1.4, 0.0]))


def test_slerp_keeps_unit_length_and_angle():
    slerp = methods.get("slerp")
    a, b = vectors([1.0, 0.0]), vectors([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        merged = slerp(None, [a, b], slerp.complete({"t": t}, ["a", "b"], "here"))
        torch.testing.assert_close(merged, vectors([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]))


def test_karcher_is_the_point_of_least_squared_angles():
    """The log maps of the models sum to zero at the result, to the tolerance."""
    models = [torch.randn(20, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(5)]
    karcher = methods.get("karcher")
    merged = karcher(None, models, karcher.complete({"max_iter": 200, "tol": 1e-12}, list("abcde"), "here"))
    torch.testing.assert_close(merged.norm(), torch.stack(models).norm(dim=1).mean())
    mean, units = merged / merged.norm(), [m / m.norm() for m in models]
    logs = [(u - (u @ mean) * mean) * (torch.acos(u @ mean) / torch.sin(torch.acos(u @ mean))) for u in units]
    assert torch.stack(logs).sum(0).norm() < 1e-10


@pytest.mark.parametrize("shape", [(1,), (6,)])
def test_karcher_of_opposite_models(shape):
    """Directions that cancel: the first one stands; a minority opposite to the others pulls nowhere."""
    a = torch.linspace(0.5, 3, shape[0], dtype=torch.float64)
    karcher = methods.get("karcher")
    torch.testing.assert_close(karcher(None, [a, -a], karcher.complete({}, ["a", "b"], "here")), a)
    given = karcher.complete({}, ["a", "b", "c"], "here")
    torch.testing.assert_close(karcher(None, [a, -3 * a, 2 * a], given), 2 * a)


def test_two_models_karcher_is_slerp_of_equal_lengths():
    a, b = (torch.randn(9, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    b = b * (a.norm() / b.norm())
    karcher, slerp = methods.get("karcher"), methods.get("slerp")
    middle = slerp(None, [a, b], slerp.complete({}, ["a", "b"], "here"))
    torch.testing.assert_close(karcher(None, [a, b], karcher.complete({}, ["a", "b"], "here")), middle)


def test_model_stock_at_its_singularity_is_the_base():
    stock = methods.get("model_stock")
    base, d = torch.ones(4, dtype=torch.float64), vectors([1.0, -2.0, 3.0, 0.5])
    assert torch.equal(stock(base, [base + d, base - d], stock.complete({}, ["a", "b"], "here")), base)


@pytest.mark.parametrize("each", [False, True])
def test_nuslerp_with_parallel_vectors_is_the_line(each):
    nuslerp = methods.get("nuslerp")
    a = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = nuslerp.complete({"weight": [1.0, 3.0], "flatten": not each}, ["a", "b"], "here")
    torch.testing.assert_close(nuslerp(None, [a, 2 * a], given), 1.75 * a)
    torch.testing.assert_close(nuslerp(None, [a, -a], given), -0.5 * a)


def test_multislerp_needs_no_tangent_step():
    """The weighted tangent vectors at the normalised mean sum to zero, which is why the closed form is exact."""
    units = [u / u.norm() for u in torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    weights = vectors([0.1, 0.2, 0.3, 0.4])
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    assert sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True)).norm() < 1e-15
    assert sphere.mean_direction(torch.eye(2, dtype=torch.float64), weights[:2], 0.0).shape == (2,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", methods.names())
def test_cuda_equals_cpu(name):
    method = methods.get(name)
    for given in contract.settings(method):
        base, models = contract.inputs(method, (33, 65))
        here = contract.merge(method, base, models, given)
        there = contract.merge(method, base.cuda(), [m.cuda() for m in models], given).cpu()
        torch.testing.assert_close(there, here, rtol=2e-6, atol=1e-6)


def test_no_file_of_this_folder_depends_on_higher_floors():
    for path in Path(methods.__file__).parent.glob("*.py"):
        for word in ("mergesearch.engine.live", "mergesearch.search", "mergesearch.evaluate", "optuna", "lm_eval"):
            assert word not in path.read_text(), (path.name, word)
