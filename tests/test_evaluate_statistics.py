from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from mergesearch.evaluate import statistics


def test_needs_numpy_only():
    code = (
        "import sys, mergesearch.evaluate.statistics, mergesearch.evaluate.scores;"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [2, 3, 97, 1000])
@pytest.mark.parametrize("kind", ["accuracy", "loglikelihood"])
def test_mean_and_its_error_are_lm_evals_to_the_last_bit(count, kind):
    lm_eval_metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(count)
    values = (rng.random(count) < 0.3).astype(float) if kind == "accuracy" else rng.normal(-30, 12, count)
    assert statistics.mean(values) == lm_eval_metrics.mean(values.tolist())
    assert statistics.mean_stderr(values) == lm_eval_metrics.mean_stderr(values.tolist())
    assert statistics.standard_error(values, "mean") == statistics.mean_stderr(values)


@pytest.mark.parametrize("aggregation", ["weighted_mean", "weighted_perplexity", "bits_per_byte", "perplexity"])
def test_figures_are_lm_evals(aggregation):
    lm_eval_metrics = pytest.importorskip("lm_eval.api.metrics")
    values = _pairs(50, seed=1)
    values = values[:, 0] / 100 if aggregation == "perplexity" else values
    items = values.tolist() if values.ndim == 1 else [tuple(pair) for pair in values.tolist()]
    assert statistics.figure(values, aggregation) == getattr(lm_eval_metrics, aggregation)(items)


@pytest.mark.parametrize("aggregation", ["weighted_mean", "weighted_perplexity", "bits_per_byte", "perplexity"])
def test_delta_method_agrees_with_resampling(aggregation):
    values = _pairs(400, seed=2)
    values = values[:, 0] / 100 if aggregation == "perplexity" else values
    rng = np.random.default_rng(3)
    resampled = [statistics.figure(values[rng.integers(0, 400, 400)], aggregation) for _ in range(2000)]
    assert statistics.standard_error(values, aggregation) == pytest.approx(np.std(resampled), rel=0.07)


@pytest.mark.parametrize("aggregation", ["mean", "bits_per_byte"])
def test_error_covers_the_truth_as_often_as_it_should(aggregation):
    rng = np.random.default_rng(4)
    truth, inside = {"mean": -50.0, "bits_per_byte": 1 / math.log(2)}[aggregation], 0
    for _ in range(400):
        pairs = _pairs(200, seed=int(rng.integers(1 << 30)))
        values = pairs[:, 0] if aggregation == "mean" else pairs
        error = statistics.standard_error(values, aggregation)
        inside += abs(statistics.figure(values, aggregation) - truth) < 1.96 * error
    assert 0.91 < inside / 400 < 0.985


@pytest.mark.parametrize("aggregation", ["mean", "bits_per_byte", "weighted_perplexity"])
def test_paired_difference_against_resampling_pairs(aggregation):
    ours, theirs = _pairs(400, seed=5), _pairs(400, seed=5)
    theirs[:, 0] += np.random.default_rng(6).normal(1.0, 2.0, 400)
    if aggregation == "mean":
        ours, theirs = ours[:, 0], theirs[:, 0]
    found = statistics.difference(ours, theirs, aggregation)
    rng = np.random.default_rng(7)
    draws = [rng.integers(0, 400, 400) for _ in range(2000)]
    resampled = [statistics.figure(ours[i], aggregation) - statistics.figure(theirs[i], aggregation) for i in draws]
    assert found.stderr == pytest.approx(np.std(resampled), rel=0.08)
    assert found.value == statistics.figure(ours, aggregation) - statistics.figure(theirs, aggregation)
    unpaired = math.hypot(*(statistics.standard_error(v, aggregation) for v in (ours, theirs)))
    assert found.stderr < unpaired / 3
    assert found.documents == 400


def test_a_system_differs_from_itself_by_nothing():
    values = _pairs(30, seed=8)
    assert statistics.difference(values, values, "bits_per_byte") == statistics.Difference(0.0, 0.0, 30)


def test_difference_refuses_other_documents():
    with pytest.raises(ValueError, match="same documents"):
        statistics.difference(np.zeros(4), np.zeros(5), "mean")


@pytest.mark.parametrize("count", [2, 7, 100])
def test_jackknife_of_a_mean_is_the_mean(count):
    values = np.random.default_rng(count).normal(size=count)
    pseudo = statistics.jackknife_values(values, lambda items: sum(items) / len(items))
    np.testing.assert_allclose(pseudo, values, atol=1e-12)
    assert statistics.standard_error(pseudo, "jackknife") == pytest.approx(statistics.mean_stderr(values))


@pytest.mark.parametrize("count", [101, 150, 1000])
def test_jackknife_of_groups(count):
    rng, calls = np.random.default_rng(count), []
    items = rng.normal(3, 1, size=count).tolist()

    def exp_of_mean(some):
        calls.append(len(some))
        return math.exp(sum(some) / len(some))

    pseudo = statistics.jackknife_values(items, exp_of_mean)
    assert pseudo.shape == (count,)
    assert len(calls) <= statistics.MOST_GROUPS + 1
    assert max(calls[1:]) - min(calls[1:]) <= 1
    expected = math.exp(np.mean(items)) * np.std(items, ddof=1) / math.sqrt(count)
    assert statistics.standard_error(pseudo, "jackknife") == pytest.approx(expected, rel=0.25)
    assert statistics.figure(pseudo, "jackknife") == pytest.approx(math.exp(np.mean(items)), rel=0.01)


def test_one_document_has_no_error():
    assert statistics.standard_error(np.array([0.5]), "mean") is None
    assert statistics.standard_error(np.array([[-3.0, 2.0]]), "bits_per_byte") is None
    assert statistics.standard_error(statistics.jackknife_values(["x"], len), "jackknife") is None
    assert statistics.pooled_stderr([0.1, 0.2], [0, 1]) is None


def test_pooled_error_is_lm_evals():
    lm_eval_metrics = pytest.importorskip("lm_eval.api.metrics")
    rng = np.random.default_rng(9)
    parts = [rng.normal(number, 1 + number, size) for number, size in enumerate((5, 17, 40))]
    theirs = lm_eval_metrics.pooled_sample_stderr([lm_eval_metrics.mean_stderr(p.tolist()) for p in parts], [5, 17, 40])
    assert statistics.pooled_stderr(np.concatenate(parts), np.repeat([0, 1, 2], [5, 17, 40])) == pytest.approx(theirs)


def test_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match=r"unknown aggregation 'median'.*bits_per_byte"):
        statistics.figure(np.zeros(3), "median")


def _pairs(count: int, seed: int) -> np.ndarray:
    """(log-likelihood, bytes) of documents of very different lengths; one nat a byte on average, -50 a document."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 91, count).astype(float)
    return np.stack([-sizes * rng.normal(1.0, 0.2, count), sizes], axis=1)
