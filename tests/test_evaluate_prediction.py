"""Predicting a mean over all documents from some of them."""

from __future__ import annotations

import numpy as np
import pytest

from mergesearch.evaluate.prediction import predict


def draw(seed: int, n: int, own: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 documents, their regressors, and n of them: y is a mixture of regressors and noise of its own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, 6))
    y = 0.3 + x @ np.array([0.6, -0.4, 0.2, 0.0, 0.0, 0.0]) + own * rng.normal(size=400)
    return y, x, rng.permutation(400)[:n]


def test_without_regressors_it_is_the_mean() -> None:
    y, _, chosen = draw(0, 50, 1.0)
    found = predict(y[chosen], np.zeros((50, 0)), np.zeros(0))
    assert found.shift == 0.0 and found.freedom == 49
    # each document's distance from the mean of the others
    others = [np.delete(y[chosen], i).mean() for i in range(50)]
    np.testing.assert_allclose(found.residuals, y[chosen] - others)
    same = predict(np.ones(5), np.ones((5, 3)), np.ones(3))
    assert same.shift == 0.0 and not same.residuals.any()


def test_residuals_are_those_of_leaving_one_out() -> None:
    y, x, chosen = draw(1, 40, 0.3)
    y, x = y[chosen], x[chosen]
    found = predict(y, x, x.mean(axis=0))
    assert found.shift == pytest.approx(0.0, abs=1e-12) and 30 < found.freedom < 36
    scale = ((x - x.mean(axis=0)) ** 2).sum() / x.shape[1]
    errors = {}
    for penalty in (0.03, 0.1, 0.3, 1.0, 3.0):
        errors[penalty] = []
        for left_out in range(40):
            a, b = np.delete(x, left_out, axis=0), np.delete(y, left_out)
            # an intercept that is not penalised, around the mean of all as the closed form has it
            design = np.column_stack([np.ones(39), a - x.mean(axis=0)])
            ridge = np.diag([0.0] + [penalty * scale] * 6)
            weights = np.linalg.solve(design.T @ design + ridge, design.T @ b)
            errors[penalty].append(y[left_out] - np.r_[1.0, x[left_out] - x.mean(axis=0)] @ weights)
    best = min(errors.values(), key=lambda each: np.sum(np.square(each)))
    np.testing.assert_allclose(found.residuals, best, atol=1e-10)


def test_what_regressors_tell_is_used_and_its_error_is_honest() -> None:
    plain, better, told = [], [], []
    for seed in range(300):
        y, x, chosen = draw(seed, 40, 0.3)
        found = predict(y[chosen], x[chosen], x.mean(axis=0))
        plain.append(y[chosen].mean() - y.mean())
        better.append(plain[-1] + found.shift)
        told.append(np.sum(found.residuals**2) / 39 / 40 * (1 - 40 / 400))
    assert np.std(better) < 0.6 * np.std(plain)
    assert np.mean(told) == pytest.approx(np.var(better), rel=0.25)


def test_regressors_that_tell_nothing_do_little_harm() -> None:
    plain, worse = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        y, x = rng.normal(size=400), rng.normal(size=(400, 8))
        found = predict(y[:30], x[:30], x.mean(axis=0))
        plain.append(y[:30].mean() - y.mean())
        worse.append(plain[-1] + found.shift)
    assert np.std(worse) < 1.1 * np.std(plain)
