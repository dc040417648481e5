"""Scoring in blocks: the same documents in the same order for every candidate, those that decide first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from mergesearch.evaluate.resampling import stream
from mergesearch.evaluate.scores import Scores

Documents = Mapping[str, Sequence[int]]  # task -> its documents

FIRST = 0.03  # of all documents, in the first block
FEWEST = 8  # documents of each task in the first block: fewer say nothing about their variance
HALVINGS = 100  # beyond what float64 resolves


def split_blocks(
    documents: Documents, count: int, seed: int, spread: Mapping[str, float] | None = None
) -> list[dict[str, list[int]]]:
    """The documents in blocks that grow geometrically, drawn at random within each task, from (seed, task) alone.

    The first block has FIRST of the documents, and each task's share is one that tells candidates apart soonest: after
    any number n of documents, task t has n_t of them in proportion to its spread, at least FEWEST and at most all
    (Neyman's allocation: the variance of a sum of independent means, sum of s_t^2 / n_t, is least where n_t is in
    proportion to s_t; Cochran, Sampling Techniques, 3rd ed. 1977, section 5.5).

    Args:
        documents: of each task, by label.
        count: how many blocks; fewer where there are too few documents.
        spread: of each task, how far one document more or less moves what candidates are compared on; 0 for a task that
            does not count. None gives every task the same fraction of its documents.

    Returns:
        Blocks, each with the numbers of its documents of each task, ascending; some tasks may have none in some blocks,
        all of them have some in the first.
    """
    sizes = {label: len(ids) for label, ids in documents.items()}
    weights = {label: float(size) if spread is None else spread.get(label, 0.0) for label, size in sizes.items()}
    orders = {label: _order(label, ids, seed) for label, ids in documents.items()}
    blocks: list[dict[str, list[int]]] = []
    before = dict.fromkeys(sizes, 0)
    for share in np.geomspace(FIRST, 1.0, count) if count > 1 else [1.0]:
        upto = sizes if share == 1.0 else _allocation(sizes, weights, float(share) * sum(sizes.values()))
        if upto != before:
            blocks.append({label: sorted(orders[label][before[label] : upto[label]]) for label in sizes})
            before = upto
    return blocks


def _order(label: str, ids: Sequence[int], seed: int) -> list[int]:
    keys = stream("blocks", seed, label).random_raw(len(ids))
    return [ids[position] for position in np.argsort(keys, kind="stable").tolist()]


def _allocation(sizes: Mapping[str, int], weights: Mapping[str, float], total: float) -> dict[str, int]:
    """How many documents of each task make up about `total`: level x weight, within [FEWEST, size]."""
    size = np.array(list(sizes.values()))
    # a task without weight comes last, after all others are used up
    largest = max(weights.values())
    weight = np.array([max(weights[label], 1e-9 * largest) if largest > 0 else 1.0 for label in sizes])

    def at(level: float) -> np.ndarray:
        return np.clip(level * weight, np.minimum(FEWEST, size), size)

    low, high = 0.0, float((size / weight).max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() < total else (low, middle)
    return dict(zip(sizes, np.ceil(at(high) - 1e-6).astype(int).tolist(), strict=True))


class ScoresParts(Protocol):
    """The part of `Scorer` that blocks need."""

    def score(self) -> Scores: ...
    def answer(self) -> None: ...
    def collect(self) -> Scores: ...
    def only(self, documents: Documents) -> ScoresParts: ...
    def answers(self) -> list[list[Any]]: ...
    def restore(self, answers: Sequence[Sequence[Any]]) -> None: ...


class BlockScorer:
    """Scores the live model block by block.

    Args:
        scorer: of all documents.
        documents: all of them.
        count: how many blocks, as for `split_blocks`.
        seed: likewise.
    """

    def __init__(self, scorer: ScoresParts, documents: Documents, count: int, seed: int):
        self._scorer, self._documents, self._wanted, self._seed = scorer, documents, count, seed
        self.sizes: dict[str, int] = {label: len(ids) for label, ids in documents.items()}
        self.arrange(None)

    def arrange(self, spread: Mapping[str, float] | None) -> None:
        """Draws the blocks, as `split_blocks` does; answers that are there belong to the blocks of the same spread."""
        self._split = split_blocks(self._documents, self._wanted, self._seed, spread)
        self._blocks: dict[int, ScoresParts] = {}
        self._first: dict[int, ScoresParts] = {}

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self._split)

    def score(self) -> Scores:
        """The scores of all documents, in one go."""
        return self._scorer.score()

    def score_block(self, number: int) -> float:
        """Asks the model about one block; returns the seconds that took.

        Raises:
            CandidateError: as for `Scorer.score`.
        """
        start = time.perf_counter()
        self._block(number).answer()
        return time.perf_counter() - start

    def collect(self, blocks: int, seconds: float = 0.0) -> Scores:
        """The scores of the first so many blocks, all of them answered or restored."""
        if blocks == self.count:
            return replace(self._scorer.collect(), seconds=seconds)
        if blocks not in self._first:
            self._first[blocks] = self._scorer.only(_together(self._split[:blocks]))
        return replace(self._first[blocks].collect(), seconds=seconds)

    def answers(self, number: int) -> list[list[Any]]:
        """One block's answers as plain data."""
        return self._block(number).answers()

    def restore(self, number: int, answers: Sequence[Sequence[Any]]) -> None:
        """Puts one block's answers back.

        Raises:
            ValueError: they are answers to other requests.
        """
        self._block(number).restore(answers)

    def _block(self, number: int) -> ScoresParts:
        if number not in self._blocks:
            self._blocks[number] = self._scorer.only(self._split[number])
        return self._blocks[number]


def _together(blocks: Sequence[Documents]) -> dict[str, list[int]]:
    return {label: [document for block in blocks for document in block[label]] for label in blocks[0]}
