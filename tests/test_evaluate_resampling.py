from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from mergesearch.evaluate import resampling, statistics
from mergesearch.evaluate.resampling import Resampling, Sample, holm, interval, p_value, stream
from mergesearch.evaluate.scores import DocumentScores


def quiz(candidates: int, documents: int, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample((rng.random((candidates, documents)) < 0.6).astype(float), "mean")


def bits(candidates: int, documents: int, seed: int = 0) -> Sample:
    """(log-likelihood, bytes) of each document; the bytes are the same for every candidate."""
    rng = np.random.default_rng(seed)
    length = rng.integers(20, 200, documents).astype(float)
    logs = -length * rng.normal(1.0, 0.2, (candidates, documents))
    return Sample(np.stack([logs, np.broadcast_to(length, logs.shape)], axis=-1), "bits_per_byte")


def perplexity(candidates: int, documents: int, seed: int = 0) -> Sample:
    return Sample(np.random.default_rng(seed).normal(-2.0, 0.4, (candidates, documents)), "perplexity")


KINDS = pytest.mark.parametrize("make", [quiz, bits, perplexity])


def test_needs_numpy_only() -> None:
    code = (
        "import sys, mergesearch.evaluate.resampling;"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'scipy', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@KINDS
def test_a_draw_is_the_figure_of_the_documents_drawn(make) -> None:
    sample = make(3, 17)
    draws = resampling.bootstrap(sample, 50, stream("key"))
    counts = np.concatenate(list(resampling._counts(stream("key"), 50, 17)))
    assert counts.shape == (50, 17) and set(counts.sum(axis=1)) == {17}
    for row in range(50):
        chosen = np.repeat(np.arange(17), counts[row].astype(int))
        for k in range(3):
            expected = statistics.figure(sample.values[k][chosen], sample.aggregation)
            assert draws[row, k] == pytest.approx(expected, rel=1e-12)


@KINDS
def test_spread_is_the_standard_error(make) -> None:
    sample = make(2, 400)
    draws = resampling.bootstrap(sample, 4000, stream(1))
    assert draws[:, 0].std() == pytest.approx(statistics.standard_error(sample.values[0], sample.aggregation), rel=0.07)
    paired = statistics.difference(*sample.values, sample.aggregation)
    assert (draws[:, 0] - draws[:, 1]).std() == pytest.approx(paired.stderr, rel=0.07)


def test_every_document_is_drawn_equally_often() -> None:
    counts = np.concatenate(list(resampling._counts(stream(2), 4000, 13))).sum(axis=0)
    # 13 bins of a multinomial: chi-square with 12 degrees of freedom is below 32.9 with probability 0.999
    assert np.sum((counts - 4000) ** 2 / 4000) < 32.9


def test_chunks_do_not_matter_to_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CHUNK", 64)
    sample = bits(3, 10)
    assert resampling.bootstrap(sample, 25, stream(0)).shape == (25, 3)
    observed, randomised = resampling.randomise(sample, [(0, 1), (2, 1)], 25, stream(0))
    assert observed.shape == (2,) and randomised.shape == (25, 2)


@KINDS
def test_a_randomised_difference_is_that_of_swapped_documents(make) -> None:
    sample = make(2, 9)
    observed, randomised = resampling.randomise(sample, [(0, 1)], 40, stream("swap"))
    ours, theirs = sample.values
    kind = sample.aggregation
    assert observed[0] == pytest.approx(statistics.figure(ours, kind) - statistics.figure(theirs, kind), rel=1e-12)
    signs = np.concatenate(list(resampling._signs(stream("swap"), 40, 9)))
    for row in range(40):
        kept = (signs[row] > 0).reshape(-1, *[1] * (ours.ndim - 1))
        first, second = np.where(kept, ours, theirs), np.where(kept, theirs, ours)
        expected = statistics.figure(first, kind) - statistics.figure(second, kind)
        assert randomised[row, 0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@KINDS
def test_p_is_that_of_all_swaps(make) -> None:
    sample = make(2, 9, seed=5)
    ours, theirs = sample.values
    kind, far, observed = sample.aggregation, 0, None
    for signs in itertools.product([True, False], repeat=9):
        kept = np.array(signs).reshape(-1, *[1] * (ours.ndim - 1))
        first, second = np.where(kept, ours, theirs), np.where(kept, theirs, ours)
        value = abs(statistics.figure(first, kind) - statistics.figure(second, kind))
        observed = value if observed is None else observed
        far += value >= observed * (1 - 1e-9)
    p = Resampling({"t": sample}, seed=1, draws=20_000).p_values([{"t": 1.0}], [(0, 1)])[0, 0]
    assert p == pytest.approx(far / 512, abs=0.012)


def test_equal_candidates_have_p_1_and_no_spread() -> None:
    values = np.repeat(quiz(1, 50).values, 2, axis=0)
    found = Resampling({"t": Sample(values, "mean")}, seed=0, draws=100)
    assert found.p_values([{"t": 1.0}], [(0, 1)])[0, 0] == 1.0
    assert found.difference_spread({"t": 1.0}, 0, 1) == (0.0, 0.0)


def test_few_differing_documents_are_no_proof() -> None:
    """Four documents of 1,000, all for one side: the bootstrap alone would call that p = 0.04; a sign test 0.125."""
    values = np.ones((2, 1000))
    values[1, :4] = 0.0
    p = Resampling({"t": Sample(values, "mean")}, seed=0, draws=20_000).p_values([{"t": 1.0}], [(0, 1)])[0, 0]
    assert p == pytest.approx(0.125, abs=0.01)


def test_a_measure_combines_tasks_resampled_each_by_itself() -> None:
    samples = {"quiz": quiz(2, 300), "bits": bits(2, 200)}
    measure = {"quiz": 0.5, "bits": -2.0}
    found = Resampling(samples, seed=0, draws=4000)
    parts = {task: statistics.difference(*s.values, s.aggregation) for task, s in samples.items()}
    assert found.difference(measure, 0, 1) == pytest.approx(sum(f * parts[t].value for t, f in measure.items()))
    low, high = found.difference_spread(measure, 0, 1)
    stderr = math.sqrt(sum((f * parts[t].stderr) ** 2 for t, f in measure.items()))
    assert (high - low) / 2 == pytest.approx(1.96 * stderr, rel=0.06)


def test_the_same_seed_gives_the_same_draws() -> None:
    first, again, other = (Resampling({"t": quiz(2, 40)}, seed=s, draws=200) for s in (3, 3, 4))
    assert first.spread({"t": 1.0}, 0) == again.spread({"t": 1.0}, 0)
    assert not np.array_equal(first._boot["t"], other._boot["t"])


def test_a_jackknife_is_resampled_by_groups() -> None:
    values = statistics.jackknife_values(
        np.random.default_rng(0).normal(size=250).tolist(), lambda x: float(np.mean(x))
    )
    sample = Sample(np.stack([values, values]), statistics.JACKKNIFE)
    assert sample.units().shape == (1, 84, 2)  # 250 documents, groups of 3
    draws = resampling.bootstrap(sample, 4000, stream(0))
    assert draws[:, 0].std() == pytest.approx(statistics.standard_error(values, statistics.JACKKNIFE), rel=0.1)


def test_documents_without_values_cannot_be_tested() -> None:
    found = Resampling({"f1": Sample(np.full((2, 20), np.nan), statistics.JACKKNIFE)}, seed=0, draws=50)
    assert found.spread({"f1": 1.0}, 0) is None
    assert np.isnan(found.p_values([{"f1": 1.0}], [(0, 1)])).all()


def test_candidates_are_aligned_by_document() -> None:
    ours = DocumentScores([1, 2, 5], np.array([0.1, 0.2, 0.5]), "mean")
    theirs = DocumentScores([2, 3, 5], np.array([2.0, 3.0, 5.0]), "mean")
    assert Sample.of([ours, theirs]).values.tolist() == [[0.2, 0.5], [2.0, 5.0]]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_p_counts_the_observed_difference_itself() -> None:
    assert p_value(1.0, np.zeros(9)) == 0.1
    assert p_value(0.0, np.zeros(9)) == 1.0


@pytest.mark.parametrize("make", [quiz, bits])
def test_intervals_cover_the_truth_as_often_as_they_should(make) -> None:
    truth = {quiz: 0.6, bits: 1 / math.log(2)}[make]
    inside = 0
    for seed in range(400):
        sample = make(1, 120, seed=seed)
        low, high = interval(resampling.bootstrap(sample, 300, stream(seed))[:, 0])
        inside += low <= truth <= high
    # 95 % of 400, give or take three standard deviations and what percentile intervals lack at 120 documents
    assert 0.90 <= inside / 400 <= 0.985
