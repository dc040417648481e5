"""Scoring in blocks: every block a share of every task, the same documents in the same order for every candidate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from mergesearch.evaluate.resampling import stream
from mergesearch.evaluate.scores import Scores

Documents = Mapping[str, Sequence[int]]  # task -> its documents


def split_blocks(documents: Documents, count: int, seed: int) -> list[dict[str, list[int]]]:
    """The documents in blocks, drawn at random within each task, from (seed, task) alone.

    Args:
        documents: of each task, by label.
        count: how many blocks; fewer where a task has fewer documents, so that each block has some of every task.

    Returns:
        Blocks of equal size, give or take a document of each task; document numbers ascending.
    """
    count = min(count, *(len(ids) for ids in documents.values()))
    found: list[dict[str, list[int]]] = [{} for _ in range(count)]
    for label, ids in documents.items():
        keys = stream("blocks", seed, label).random_raw(len(ids))
        order = [ids[position] for position in np.argsort(keys, kind="stable").tolist()]
        for number, block in enumerate(found):
            block[label] = sorted(order[number * len(ids) // count : (number + 1) * len(ids) // count])
    return found


class Splits(Protocol):
    """The part of `Scorer` that blocks need."""

    def score(self) -> Scores: ...
    def answer(self) -> None: ...
    def collect(self) -> Scores: ...
    def only(self, documents: Documents) -> Splits: ...
    def answers(self) -> list[list[Any]]: ...
    def restore(self, answers: Sequence[Sequence[Any]]) -> None: ...


class BlockScorer:
    """Scores the live model block by block.

    Args:
        scorer: of all documents.
        blocks: as `split_blocks` gives them; together all documents of the scorer.
    """

    def __init__(self, scorer: Splits, blocks: Sequence[Documents]):
        self._scorer = scorer
        self._blocks = [scorer.only(block) for block in blocks]
        self._first = [scorer.only(_together(blocks[: number + 1])) for number in range(len(blocks) - 1)]
        self.sizes = {label: sum(len(block[label]) for block in blocks) for label in blocks[0]}

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    def score(self) -> Scores:
        """The scores of all documents, in one go."""
        return self._scorer.score()

    def score_block(self, number: int) -> float:
        """Asks the model about one block; returns the seconds that took.

        Raises:
            CandidateError: as for `Scorer.score`.
        """
        start = time.perf_counter()
        self._blocks[number].answer()
        return time.perf_counter() - start

    def collect(self, blocks: int, seconds: float = 0.0) -> Scores:
        """The scores of the first so many blocks, all of them answered or restored."""
        part = self._scorer if blocks == self.count else self._first[blocks - 1]
        return replace(part.collect(), seconds=seconds)

    def answers(self, number: int) -> list[list[Any]]:
        """One block's answers as plain data."""
        return self._blocks[number].answers()

    def restore(self, number: int, answers: Sequence[Sequence[Any]]) -> None:
        """Puts one block's answers back.

        Raises:
            ValueError: they are answers to other requests.
        """
        self._blocks[number].restore(answers)


def _together(blocks: Sequence[Documents]) -> dict[str, list[int]]:
    return {label: [document for block in blocks for document in block[label]] for label in blocks[0]}
