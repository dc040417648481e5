"""Races whose documents come in another order than by how far the parents differ: by what the finished proposals tell.

Used by scripts/bench/racing.py; results/racing.md says why none of these is how `racing:` works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mergesearch.evaluate import statistics
from mergesearch.evaluate.blocks import split_blocks
from mergesearch.search.racing import spreads
from scripts.bench.shared.replay import Matrix, Raced, play, race_one

# finished proposals that an order is made from, and from how many on
LATEST, FEWEST = 12, 4
# documents that a half of a task has at least
HALF = 16
PENALTY = 0.1

# (matrix, the latest finished proposals with the best one last) -> the matrix, its tasks cut or not, and their spreads
Order = Callable[[Matrix, Sequence[int]], tuple[Matrix, Mapping[str, float]]]


def by_proposals(matrix: Matrix, latest: Sequence[int]) -> tuple[Matrix, Mapping[str, float]]:
    """Neyman's allocation between tasks, by how the proposals' paired differences vary, in place of the parents'."""
    return matrix, spreads([matrix.documents(trial) for trial in latest], matrix.factors)


def by_residuals(matrix: Matrix, latest: Sequence[int]) -> tuple[Matrix, Mapping[str, float]]:
    """The same, by what a regression of these differences on the baselines' leaves: what a race has to find out."""
    found = {}
    for task, factor in matrix.factors.items():
        kind = matrix.aggregations[task]
        moves = [
            statistics.influence(matrix.values[task][trial], kind) for trial in (*latest, *range(matrix.baselines))
        ]
        apart = np.stack(moves) - moves[len(latest) - 1]
        apart -= apart.mean(axis=1, keepdims=True)
        ours, theirs = apart[: len(latest) - 1], apart[len(latest) :]
        inner = theirs @ theirs.T
        inner += PENALTY * np.trace(inner) / len(theirs) * np.eye(len(theirs))
        left = ours - ours @ theirs.T @ np.linalg.solve(inner, theirs)
        found[task] = abs(factor) * float(np.sqrt(left.var(axis=1).mean()))
    return matrix, found


def by_documents(matrix: Matrix, latest: Sequence[int]) -> tuple[Matrix, Mapping[str, float]]:
    """Each task cut in two: the documents on which the proposals differ from the best one, and those on which they do
    not; Neyman's allocation between the halves. The item-response view: a document that all find as hard tells
    nothing."""
    values, kinds, factors = {}, {}, {}
    for task, factor in matrix.factors.items():
        whole = matrix.values[task]
        halves = {task: np.ones(whole.shape[1], dtype=bool)}
        if whole.ndim == 2:
            told = ((whole[list(latest)] - whole[latest[-1]]) ** 2).mean(axis=0)
            hot = told > (np.median(told) if (told > 0).mean() > 0.9 else 0)
            if min(hot.sum(), (~hot).sum()) >= HALF:
                halves = {f"{task}, told apart": hot, f"{task}, alike": ~hot}
        for name, which in halves.items():
            values[name], kinds[name] = whole[:, which], matrix.aggregations[task]
            factors[name] = factor * float(which.mean())
    cut = replace(matrix, values=values, aggregations=kinds, factors=factors, gold={})
    return cut, spreads([cut.documents(trial) for trial in latest], factors)


ORDERS: dict[str, Order | None] = {
    "the parents' differences between tasks (as it is)": None,
    "the proposals' differences between tasks": by_proposals,
    "what the baselines do not predict of these": by_residuals,
    "documents that tell proposals apart": by_documents,
}


def race_in_order(matrix: Matrix, order: Order | None, blocks: int, error: float, seed: int) -> Raced:
    """One search over the recorded trials, in their order, by spread and regression as in `replay.race_all`."""
    parents = spreads([matrix.documents(trial) for trial in range(matrix.baselines)], matrix.factors)
    parts = _parts(matrix, parents, blocks, seed)

    def race(trial: int, best: int, others: Sequence[int], late: Sequence[int]) -> int:
        raced, drawn = matrix, parts
        latest = [other for other in late[-LATEST:] if other != best]
        if order is not None and len(latest) >= FEWEST:
            raced, spread = order(matrix, [*latest, best])
            drawn = _parts(raced, spread, blocks, seed)
        return race_one(raced, trial, best, others, drawn, error)

    return play(matrix, range(matrix.trials), race)


def _parts(matrix: Matrix, spread: Mapping[str, float], blocks: int, seed: int) -> list[dict[str, list[int]]]:
    return split_blocks({task: list(range(size)) for task, size in matrix.sizes().items()}, blocks, seed, spread)
