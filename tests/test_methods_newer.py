"""The methods that mergekit lacks: against fusion-bench's recorded figures, and against formulas written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import contract
from torch import Tensor

from mergesearch import methods
from mergesearch.errors import UserError
from mergesearch.methods import mask_key, matrices, regression
from mergesearch.methods.task_vector import drop
from scripts.bench.shared import fusion_bench

MATRICES = [name for name in methods.names() if methods.get(name).matrices]
WRAPPED = ["task_arithmetic+lines", "ties+svc", "dare_ties+lines+svc", "iso+lines", "linear+svc", "tsv+lines"]


def pool(shape=(14, 10), count=3, seed=0, rank=None, scale=0.1) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it in float64; `rank`: of their task vectors."""
    g = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    base = noise(*shape)
    changes = [noise(*shape) if rank is None else noise(shape[0], rank) @ noise(rank, shape[1]) for _ in range(count)]
    return base, [base + scale * d for d in changes]


def merged(name: str, base: Tensor, models: list[Tensor], **given: Any) -> Tensor:
    """The merged task vector."""
    method = methods.get(name)
    complete = method.complete(given, [f"m{i}" for i in range(len(models))], "the test")
    keys = [mask_key(0, f"m{i}", "w") for i in range(len(models))]
    return method(base, models, complete, keys) - base


# --- parity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", list(fusion_bench.recorded()), ids=lambda one: f"{one.case} {one.label}")
def test_equals_fusion_bench(one):
    torch.testing.assert_close(one.ours(), one.theirs, rtol=1e-9, atol=1e-9 * float(one.theirs.abs().max()))
    torch.testing.assert_close(
        one.ours(torch.float32).double(), one.theirs, rtol=1e-4, atol=1e-4 * one.theirs.abs().max()
    )


@pytest.mark.parametrize("one", list(fusion_bench.stopped_early()), ids=lambda one: one.case)
def test_regmean_free_is_the_optimum_that_wudi_goes_towards(one):
    """fusion-bench's 400 steps of Adam from the sum end above the closed form's loss, and never below it."""

    def loss(merged: Tensor) -> float:
        return float(sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in one.vectors))

    base = torch.zeros_like(one.vectors[0])
    ours = loss(merged("regmean_free", base, one.vectors, p=1.0))
    assert ours <= loss(one.theirs) * (1 + 1e-9)
    assert loss(one.theirs) < loss(sum(one.vectors))


# --- written out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(14, 10), (4, 30)], ids=["columns", "rows"])
def test_regmean_free_is_the_ridge_regression(shape, p):
    base, models = pool(shape)
    weights = [0.5, 1.0, 2.0]
    changes = [m - base for m in models]
    grams = [w * d.T @ d / d.square().sum() ** p for d, w in zip(changes, weights, strict=True)]
    whole = sum(grams)
    ridge = 1e-6 * whole.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)
    wanted = sum(d @ g for d, g in zip(changes, grams, strict=True)) @ torch.linalg.inv(whole + ridge)
    got = merged("regmean_free", base, models, weight=weights, p=p)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-8)
    assert regression.by_rows(base, models) == (shape == (4, 30))


def test_regmean_free_of_adapters_is_the_solve_in_their_joint_row_space():
    """Low ranks: the full solve equals the one in the space that the adapters' rows span, and the pseudo-inverse."""
    base, models = pool((40, 60), rank=3)
    changes = [m - base for m in models]
    q = torch.linalg.svd(torch.cat(changes)).Vh[: 3 * len(models)].T
    turned = [d @ q for d in changes]
    grams = [t.T @ t for t in turned]
    wanted = sum(t @ g for t, g in zip(turned, grams, strict=True)) @ torch.linalg.pinv(sum(grams)) @ q.T
    torch.testing.assert_close(merged("regmean_free", base, models), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


def test_star_keeps_the_nuclear_norm():
    base, models = pool()
    weights, eta = [1.0, 2.0, 3.0], 0.45
    wanted = torch.zeros_like(base)
    for model, w in zip(models, weights, strict=True):
        u, s, v = torch.linalg.svd(model - base, full_matrices=False)
        rank = next(r for r in range(1, len(s) + 1) if s[:r].sum() >= eta * s.sum())
        cut = (u[:, :rank] * s[:rank]) @ v[:rank] * (s.sum() / s[:rank].sum())
        assert torch.linalg.matrix_norm(cut, "nuc") == pytest.approx(float(s.sum()))
        wanted += w * cut / sum(weights)
    torch.testing.assert_close(merged("star", base, models, weight=weights, eta=eta), wanted)
    # the triples that are kept are those of a share above the one asked for
    torch.testing.assert_close(merged("star", base, models, eta=1.0), sum(m - base for m in models) / 3)


def test_resmerge_is_what_the_paper_says():
    base, models = pool(seed=3)
    shared = pool(seed=4)[1][0] - pool(seed=4)[0]
    models = [m + 2 * shared for m in models]
    changes = [m - base for m in models]
    tops = []
    for d in changes:
        u, s, v = torch.linalg.svd(d, full_matrices=False)
        tops.append(s[0] * torch.outer(u[:, 0], v[0]))
    rests = [d - h for d, h in zip(changes, tops, strict=True)]

    def cos(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / a.norm() / b.norm()

    q = sum(r / r.norm() for r in rests)
    q = q / q.norm()
    c = sum(cos(r, q) for r in rests) / 3
    pairs = [(0, 1), (0, 2), (1, 2)]
    s = sum(cos(rests[i], rests[j]) for i, j in pairs) / 3
    exponent = 1 - (1 - 0.7) * ((s + 1) / 2 + (c + 1) / 2) / 2
    a = c**exponent * sum(r.norm() for r in rests) / 3 * q
    positive = [x for x in (cos(tops[i], tops[j]) for i, j in pairs) if x > 0]
    head = sum(tops) / sum(tops).norm()
    assert c > 3**-0.5 and positive
    wanted = a + 0.2 * (sum(positive) / len(positive)) * a.norm() * head
    torch.testing.assert_close(merged("resmerge", base, models), wanted, rtol=1e-8, atol=1e-10)


def test_resmerge_averages_what_does_not_agree():
    base, models = pool()
    models = [models[0], 2 * base - models[0], models[1]]
    torch.testing.assert_close(merged("resmerge", base, models), sum(m - base for m in models) / 3)
    torch.testing.assert_close(merged("resmerge", base, models[:1]), models[0] - base)


def test_iso_between_task_arithmetic_and_flat():
    base, models = pool()
    weights = [0.2, 0.5, 0.9]
    whole = sum(w * (m - base) for m, w in zip(models, weights, strict=True))
    torch.testing.assert_close(merged("iso", base, models, weight=weights, a=1.0), whole)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    for a in (0.0, 0.3):
        wanted = (u * (s.mean() ** (1 - a) * s**a)) @ v
        torch.testing.assert_close(merged("iso", base, models, weight=weights, a=a), wanted)


@pytest.mark.parametrize("name", ["iso", "iso_cts", "tsv", "star", "knots", "ties+svc"])
def test_noise_below_the_rank_is_not_scaled_up(name):
    """Task vectors of rank 2: a change of 1e-12 of their length moves the result by as little."""
    base, models = pool((64, 48), count=2, rank=1)
    g = torch.Generator().manual_seed(9)
    moved = [m + 1e-13 * torch.randn(m.shape, generator=g, dtype=torch.float64) for m in models]
    first, second = merged(name, base, models), merged(name, base, moved)
    assert (first - second).norm() < 1e-7 * first.norm()


@pytest.mark.parametrize("name", MATRICES)
def test_scale_and_order_do_not_matter(name):
    """Task vectors a million times as small give a merge a million times as small; models may come in any order."""
    base, models = pool()
    start = torch.zeros_like(base)
    changes = [m - base for m in models]
    one = merged(name, start, changes)
    torch.testing.assert_close(
        merged(name, start, [d * 2.0**-20 for d in changes]) * 2.0**20, one, rtol=1e-6, atol=1e-9
    )
    if not methods.get(name).random:
        torch.testing.assert_close(merged(name, start, changes[::-1]), one, rtol=1e-8, atol=1e-10)


def test_knots_dare_is_unbiased_and_keyed():
    base, models = pool()
    method = methods.get("knots_dare")
    complete = method.complete({"density": 0.5, "normalize": True}, ["a"], "the test")
    draws = [method(base, models[:1], complete, [mask_key(seed, "a", "w")]) - base for seed in range(400)]
    assert not torch.equal(draws[0], draws[1])
    wanted = models[0] - base
    assert (sum(draws) / 400 - wanted).norm() < 0.15 * wanted.norm()


def test_dare_divides_by_its_own_number():
    d = torch.arange(1, 61, dtype=torch.float64).reshape(6, 10)
    zero = torch.zeros_like(d)
    usual, own = (merged("dare_linear", zero, [d], density=0.4, q=q) for q in (0.0, 0.8))
    torch.testing.assert_close(usual, drop(d, 0.4, "inverse", mask_key(0, "m0", "w"), 1))
    torch.testing.assert_close(own, usual * 0.4 / 0.8)


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_no_matrix_is_averaged(name):
    """Norms and biases, and rows or columns alone: as the paper of each method does; ties for KnOTS."""
    for shape in ((7,), (1, 6), (6, 1)):
        base, models = pool(shape)
        if name.startswith("knots"):
            ties = "ties" if name == "knots" else "dare_ties"
            wanted = merged(ties, base, models)
        else:
            wanted = sum(m - base for m in models) / 3
        torch.testing.assert_close(merged(name, base, models), wanted)


def test_nothing_that_is_not_finite_is_hidden():
    base, models = pool()
    models[1][2, 3] = torch.inf
    for name in (*MATRICES, "ties+svc"):
        assert not torch.isfinite(merged(name, base, models)).all(), name


def test_signs_and_ranks_are_fixed():
    base, models = pool()
    u, s, v = matrices.triples(models[0] - base)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close((u * s) @ v, models[0] - base)
    assert [t.shape for t in matrices.triples(torch.zeros(4, 3, dtype=torch.float64))] == [(4, 0), (0,), (0, 3)]
    low = pool((9, 7), rank=2)
    assert len(matrices.triples(low[1][0] - low[0])[1]) == 2
    assert len(matrices.triples((low[1][0] - low[0]).float().double())[1]) == 2


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPED)
def test_contract_of_what_is_wrapped(name):
    for check in contract.CHECKS.values():
        check(methods.get(name))


def test_lines_scales_by_depth():
    """The paper's a + b t, with a = |mean d|_1 / |D|_1 where none is given: 1/T for the plain sum."""
    base, models = pool()
    whole = sum(m - base for m in models)
    for depth, scale in ((-1.0, 1 / 3), (0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)):
        torch.testing.assert_close(merged("task_arithmetic+lines", base, models, depth=depth), scale * whole)
    stated = merged("task_arithmetic+lines", base, models, depth=0.25, shallow=0.2, deep=1.4)
    torch.testing.assert_close(stated, 0.5 * whole)


def test_wrappers_are_named_after_methods():
    assert methods.wrappers() == ["lines", "svc"]
    wrapped = methods.get("ties+svc")
    assert methods.get("ties+svc") is wrapped and wrapped.matrices and wrapped.aside == "ties"
    assert methods.get("tsv+lines+svc").aside == "task_arithmetic+lines"
    assert set(wrapped.parameters) == {*methods.get("ties").parameters, "floor", "embeddings"}
    with pytest.raises(UserError, match=r"'scv'.*'svc'"):
        methods.get("ties+scv")
    with pytest.raises(UserError, match=r"'tise'.*'ties'"):
        methods.get("tise+svc")
    with pytest.raises(UserError, match="once"):
        methods.get("ties+svc+svc")
    assert [row["name"] for row in methods.describe_wrappers()] == ["lines", "svc"]


@pytest.mark.parametrize("length", [1, 5, 72, 73, 200, 800])
def test_a_division_in_halves_is_a_division(length):
    g = torch.Generator().manual_seed(length)
    rows = torch.randn(length + 3, length, dtype=torch.float64, generator=g)
    gram, left = rows.T @ rows + torch.eye(length, dtype=torch.float64), rows[:4].clone()
    found = matrices.times_inverse(left.clone(), gram.clone())
    torch.testing.assert_close(found, torch.linalg.solve(gram, left.T).T, rtol=1e-9, atol=1e-12)
    assert matrices.times_inverse(left, -gram).isnan().all()
