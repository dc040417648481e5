from __future__ import annotations

import json

import numpy as np
import pytest

from mergesearch.search.soup.early_stopping import EarlyStopping

FACTORS = {"one": 0.25, "two": 3.0}
BEST = {"one": np.linspace(0.0, 2.0, 12), "two": np.linspace(0.5, 0.9, 40)}
RNG = np.random.default_rng(0)
# what sets two candidates apart on each document, with a mean of 0
NOISE = {task: (noise := 0.1 * RNG.standard_normal(len(losses))) - noise.mean() for task, losses in BEST.items()}
# the standard error of its weighted mean, by hand: the variances of independent means add up
STDERR = sum(FACTORS[task] ** 2 * np.sum(found**2) / (len(found) - 1) / len(found) for task, found in NOISE.items())
STDERR = float(np.sqrt(STDERR))


def begun(patience=4, values=0.0):
    stopping = EarlyStopping(patience, dict(FACTORS))
    assert stopping.look(BEST, np.array([[values]]))
    return stopping


def higher_by(standard_errors):
    """Losses whose weighted mean is that much higher than the best look's, with the noise above."""
    shift = standard_errors * STDERR / sum(FACTORS.values())
    return {task: BEST[task] + NOISE[task] + shift for task in BEST}


def test_the_loss_is_the_weighted_sum_of_the_means():
    assert begun().loss(BEST) == pytest.approx(0.25 * 1.0 + 3.0 * 0.7)
    assert begun().loss(higher_by(2)) == pytest.approx(0.25 * 1.0 + 3.0 * 0.7 + 2 * STDERR)


@pytest.mark.parametrize(("standard_errors", "kept"), [(-1, True), (0.99, True), (1.01, False), (5, False)])
def test_later_weights_are_kept_unless_they_are_worse_beyond_noise(standard_errors, kept):
    stopping = begun()
    assert stopping.look(higher_by(standard_errors), np.array([[1.0]])) is kept
    assert stopping.kept.tolist() == [[1.0 if kept else 0.0]]
    assert stopping.worse == (not kept)
    lower = standard_errors < 0
    assert all((stopping.best[task] is BEST[task]) is not lower for task in BEST)


@pytest.mark.parametrize("count", [2, 16, 400])
def test_a_document_that_explodes_is_not_noise(count):
    stopping = EarlyStopping(4, {"one": 1.0})
    best = np.linspace(0.4, 0.6, count)
    stopping.look({"one": best}, np.zeros((1, 1)))
    exploded = best - 1e-3  # the difference has a mean of its own standard error, and one look less
    exploded[0] = 40.0
    assert not stopping.look({"one": exploded}, np.ones((1, 1)))
    assert stopping.kept.tolist() == [[0.0]]


def test_small_losses_do_not_add_up():
    stopping = begun()
    drift = [stopping.look(higher_by(0.3 * step), np.array([[float(step)]])) for step in range(1, 6)]
    assert drift == [True, True, True, False, False]
    assert stopping.kept.tolist() == [[3.0]]


def test_patience_counts_the_looks_in_a_row():
    stopping, values = begun(patience=2), np.zeros((1, 1))
    for standard_errors, over in [(2, False), (0.5, False), (2, False), (3, True)]:
        stopping.look(higher_by(standard_errors), values)
        assert stopping.over is over


@pytest.mark.parametrize(("standard_errors", "kept"), [(-2, True), (-1.01, True), (-0.99, False), (0.5, False)])
def test_weights_that_were_learned_before_are_kept_unless_others_are_better_beyond_noise(standard_errors, kept):
    stopping = EarlyStopping(2, dict(FACTORS), again=True)
    assert stopping.look(BEST, np.zeros((1, 1)))
    assert stopping.look(higher_by(standard_errors), np.ones((1, 1))) is kept
    assert stopping.kept.tolist() == [[1.0 if kept else 0.0]] and not stopping.worse
    on = EarlyStopping(2, dict(FACTORS), again=True)
    on.restore(json.loads(json.dumps(stopping.data())))
    for further in (-0.5, -3, -1.5, 4, 4):
        losses, values = higher_by(further), np.array([[further]])
        assert on.look(losses, values) is stopping.look(losses, values)
        assert on.data() == stopping.data()
    assert stopping.over


def test_without_documents_to_look_at_the_last_weights_are_kept():
    for again in (False, True):
        stopping = EarlyStopping(2, {}, again=again)
        assert all(stopping.look({}, np.full((1, 1), number)) for number in range(3))
        assert stopping.kept.tolist() == [[2.0]]


def test_weights_are_copied():
    values = np.array([[1.0]])
    stopping = EarlyStopping(4, {"one": 1.0})
    stopping.look({"one": np.ones(3)}, values)
    values[:] = 2.0
    assert stopping.kept.tolist() == [[1.0]]


def test_one_document_says_nothing_about_noise():
    stopping = EarlyStopping(4, {"one": 1.0})
    assert stopping.look({"one": np.ones(1)}, np.zeros((1, 1)))
    assert not stopping.look({"one": np.ones(1) + 1e-9}, np.ones((1, 1)))
    assert stopping.look({"one": np.ones(1)}, np.ones((1, 1)))


def test_it_goes_on_from_json_as_it_would_have():
    stopping = begun()
    stopping.look(higher_by(0.5), np.array([[1 / 3]]))
    stopping.look(higher_by(2), np.array([[2.0]]))
    again = EarlyStopping(4, dict(FACTORS))
    again.restore(json.loads(json.dumps(stopping.data())))
    assert (again.worse, again.kept.tolist()) == (1, [[1 / 3]])
    for standard_errors in (0.9, 1.1, -0.5):
        losses, values = higher_by(standard_errors), np.array([[standard_errors]])
        assert again.look(losses, values) is stopping.look(losses, values)
        assert again.data() == stopping.data()
