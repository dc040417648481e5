"""Every method against mergekit 0.1.5, and each difference on purpose stated.

Deterministic methods: random shapes, numbers of models, zero deltas, equal magnitudes, mixed signs, in float32 and
float64. Random methods: their distributions, and everything at density 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergesearch import methods
from mergesearch.methods import mask_key, sparse, task_vector

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'mergesearch[parity]'")

from scripts.bench.shared import oracle

RANDOM = [name for name in oracle.METHODS if methods.get(name).random]
shapes = st.one_of(
    st.sampled_from([(), (1,), (1, 1), (2,), (3, 1)]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def cases(draw, name: str, dtype: torch.dtype):
    method = methods.get(name)
    most = method.max_models or (12 if method.family == "task_vector" else 6)
    least = min(most, max(method.min_models, 1 if method.family == "task_vector" else 2))
    count = draw(st.integers(least, most))
    flags = {flag: draw(st.booleans()) for flag in ("zero", "quantised", "with_base")}
    return oracle.make(name, draw(shapes), count, dtype, draw(seeds), **flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", oracle.DETERMINISTIC)
def test_equals_mergekit(name, dtype):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(name, dtype))
    def run(case):
        difference = oracle.compare(case)
        assert difference.units <= oracle.allowed(case), difference

    run()


@pytest.mark.parametrize("name", oracle.DETERMINISTIC)
@pytest.mark.parametrize("seed", range(3))
def test_large_tensors(name, seed):
    """Nearly all of a larger tensor is compared; sums over it in float32 cost mergekit some more units."""
    case = oracle.make(name, (100, 150), methods.get(name).max_models or 4, torch.float32, seed)
    difference = oracle.compare(case)
    assert difference.compared > 0.95 * difference.total
    assert difference.units <= 4 * oracle.UNITS
    assert oracle.errors(case)[0] <= oracle.UNITS * 2.0**-23 * max(
        oracle.magnitude(case), float(case.ours().abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rescale", ["l1", "none"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_methods_at_density_one(name, rescale, dtype):
    """With nothing to drop what is left, the weighting and the election, equals mergekit's."""
    method = methods.get(name)
    for seed, count in enumerate((1, 2, 5, 11)):
        drawn = oracle.make("ties", (6, 7), count, dtype, seed)
        given = {"weight": drawn.parameters["weight"], "lambda": 0.7, "rescale": rescale, "normalize": seed % 2 == 0}
        complete = method.complete(given, [f"m{i}" for i in range(count)], "a case")
        case = oracle.Case(name, drawn.base, drawn.models, complete)
        assert oracle.compare(case).units <= oracle.UNITS


def theirs(name, base, model, seed=0, **parameters):
    """One draw of a random method of mergekit, which takes torch's global generator."""
    from mergekit.merge_methods import merge_tensors

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return merge_tensors(
            [base, model], name, parameters={"weight": 1.0, **parameters}, base_index=0, dtype=model.dtype
        )


def test_della_keeps_with_the_same_probabilities():
    """mergekit's shares kept over 500 draws are our probabilities, within five standard errors."""
    d = torch.tensor([[5.0, 1, 3, 2, 4], [-10, 20, -30, 40, 50]], dtype=torch.float64)
    zero = torch.zeros_like(d)
    p = sparse.keep_probabilities(sparse.magnitude_ranks(d), 0.5, 0.2).double()
    draws = [theirs("della_linear", zero, d, s, density=0.5, epsilon=0.2, rescale=False) != 0 for s in range(500)]
    assert ((torch.stack(draws).double().mean(0) - p).abs() < 5 * (p * (1 - p) / 500).sqrt()).all()


def test_dare_keeps_the_same_share():
    d = torch.arange(1, 401, dtype=torch.float64)
    kept = sum(int(theirs("dare_linear", d * 0, d, s, density=0.3).count_nonzero()) for s in range(50))
    ours = [task_vector.drop(d, 0.3, "inverse", mask_key(s, "m", "w"), 1).count_nonzero() for s in range(50)]
    deviation = math.sqrt(400 * 50 * 0.3 * 0.7)
    assert abs(kept - 6000) < 5 * deviation and abs(int(sum(ours)) - 6000) < 5 * deviation


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_l1_is_the_rule_of_mergekit(name):
    """mergekit scales what it kept to the L1 norm of the task vector, as `rescale: l1` does; ours divide by the
    probability of being kept unless told so, which is what the papers state and what makes them unbiased."""
    d = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = methods.get(name)
    for rule, same in (({"rescale": "l1"}, True), ({}, False)):
        complete = method.complete({"density": 0.4, **rule}, ["m"], "a case")
        merged = method(d * 0, [d], complete, [mask_key(0, "m", "w")])
        assert torch.isclose(merged.abs().sum(), d.abs().sum()) == same
    drawn = theirs(name, d * 0, d, density=0.4)
    torch.testing.assert_close(drawn.abs().sum(), d.abs().sum(), rtol=1e-6, atol=0)
    factors = (drawn / d)[drawn != 0]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-5, atol=0)


def test_difference_ties_at_the_cut():
    """mergekit keeps exactly k of equal magnitudes, which of them its sort decides; ours keep all of them."""
    base, model = torch.zeros(5), torch.tensor([1.0, -2.0, 2.0, 3.0, 2.0])
    ties = methods.get("ties")
    complete = ties.complete({"density": 0.4}, ["m"], "a case")
    assert ties(base, [model], complete).tolist() == [0.0, -2.0, 2.0, 3.0, 2.0]
    assert oracle.merge_tensors("ties", base, [model], complete).count_nonzero() == 2


def test_difference_bf16_arithmetic():
    """mergekit computes in bf16 where it is given bf16; ours compute in float32 and round once, so they are the
    nearest bf16 numbers to the truth but for double rounding, and its own are not."""
    case = oracle.make("ties", (100, 100), 3, torch.bfloat16, 1)
    base, models = case.base.to(torch.bfloat16), case.models
    wide = [t.double() for t in (base, *models)]
    truth = methods.get("ties")(wide[0], wide[1:], case.parameters)
    narrow = [t.float() for t in (base, *models)]
    ours = methods.get("ties")(narrow[0], narrow[1:], case.parameters).to(torch.bfloat16)
    its = oracle.merge_tensors("ties", base, models, case.parameters, torch.bfloat16)
    nearest = truth.to(torch.bfloat16)
    assert (ours == nearest).double().mean() > 0.999
    assert (its == nearest).double().mean() < 0.95
    assert (its.double() - truth).norm() > 1.2 * (ours.double() - truth).norm()


def test_difference_angles_in_float32():
    """mergekit's float32 angle between nearly opposite vectors has few right digits; ours comes from float64 sums."""
    a = torch.randn(64, generator=torch.Generator().manual_seed(0))
    nearly = -a + 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    complete = methods.get("nuslerp").complete({"weight": [1.0, 3.0]}, ["a", "b"], "a case")
    truth = methods.get("nuslerp")(None, [a.double(), nearly.double()], complete)
    exact = oracle.merge_tensors("nuslerp", None, [a.double(), nearly.double()], complete)
    torch.testing.assert_close(truth, exact, rtol=1e-8, atol=1e-8)
    ours = (methods.get("nuslerp")(None, [a, nearly], complete) - truth).norm()
    its = (oracle.merge_tensors("nuslerp", None, [a, nearly], complete) - truth).norm()
    assert its > 10 * ours


def test_difference_weights_that_cancel():
    """mergekit's linear divides by their sum of zero; ours count a vanishing sum as one."""
    d = torch.tensor([1.0, 2.0])
    complete = methods.get("linear").complete({"weight": [1.0, -1.0]}, ["a", "b"], "a case")
    assert oracle.merge_tensors("linear", None, [d, d], complete).isnan().all()
    assert methods.get("linear")(None, [d, 2 * d], complete).tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(("shape", "density", "epsilon"), [((4,), 0.1, 0.15), ((4,), 0.95, 0.15), ((3, 1), 0.5, 0.15)])
def test_difference_della_where_mergekit_refuses(shape, density, epsilon):
    """density +- epsilon outside (0, 1) and rows of one element are errors there; ours narrow epsilon."""
    d = torch.ones(shape)
    with pytest.raises((ValueError, RuntimeError, IndexError, ZeroDivisionError)):
        merged = theirs("della_linear", d * 0, d, density=density, epsilon=epsilon)
        if merged.isnan().any():
            raise ValueError("not a number")
    method = methods.get("della_linear")
    complete = method.complete({"density": density, "epsilon": epsilon}, ["m"], "a case")
    assert method(d * 0, [d], complete, [mask_key(0, "m", "w")]).isfinite().all()


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_difference_breadcrumbs_of_tiny_tensors(name):
    """mergekit erases the change of a tensor shorter than 1/density; ours keep one element."""
    base, model = torch.zeros(1), torch.tensor([2.0])
    complete = methods.get(name).complete({"density": 0.5}, ["m"], "a case")
    assert oracle.merge_tensors(name, base, [model], complete).tolist() == [0.0]
    assert methods.get(name)(base, [model], complete).tolist() == [2.0]


def test_difference_sce_that_selects_nothing():
    """Where nothing varies, or select_topk of it is less than one element, mergekit gives the base."""
    base, model = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    complete = methods.get("sce").complete({"select_topk": 0.1}, ["a", "b"], "a case")
    for other, expected in ((model, [1.0, 2.0, 3.0]), (model * 2, [0.0, 0.0, 5.4])):
        assert oracle.merge_tensors("sce", base, [model, other], complete).tolist() == [0.0, 0.0, 0.0]
        assert methods.get("sce")(base, [model, other], complete).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
def test_difference_very_small_tensors(name):
    """mergekit takes tensors with a norm below 1e-8 (1e-6 for karcher) for zero; ours know no scale."""
    models = [torch.tensor([1.0, 0.2, 0.0]), torch.tensor([0.3, -0.5, 0.2])]
    small = [m * 1e-9 for m in models]
    method = methods.get(name)
    complete = method.complete({}, ["a", "b"], "a case")
    torch.testing.assert_close(method(None, small, complete) * 1e9, method(None, models, complete))
    its = oracle.merge_tensors(name, None, small, complete) * 1e9
    assert not torch.allclose(its, oracle.merge_tensors(name, None, models, complete), rtol=1e-2)
