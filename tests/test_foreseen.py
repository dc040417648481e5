"""What measuring statistics will take is told from two tries on one model."""

from __future__ import annotations

import pytest
import torch

from mergesearch.search.soup.foreseen import Foreseen, foreseen


class Measured:
    """Takes a time for each model and one for each document, by a clock of its own."""

    def __init__(self, once: float, each: float):
        self.once, self.each, self.now = once, each, 0.0
        self.tried: list[int] = []

    def measure(self, sizes, documents) -> None:
        count = sum(map(len, documents.values()))
        self.tried.append(count)
        self.now += self.once + self.each * count
        sizes.add("a", ["one", "two"], torch.zeros(5, 5))

    def told(self, documents, models: int = 4, most: int = 6) -> Foreseen | None:
        return foreseen(self.measure, documents, models, most, lambda: self.now)


def test_what_hangs_on_the_documents_is_told_apart():
    measured = Measured(once=2.0, each=0.5)
    found = measured.told({"a": list(range(10)), "b": list(range(4))})
    assert found is not None and measured.tried == [2, 2, 6]
    assert (found.documents, found.kept) == (6 + 4, 4 * 100)
    assert found.seconds == pytest.approx(4 * 2.0 + 10 * 0.5, rel=1e-3)


def test_as_few_documents_as_there_are():
    found = Measured(once=2.0, each=0.5).told({"a": [7]}, models=1)
    assert found is not None and found.documents == 1 and found.seconds == pytest.approx(2.5, rel=1e-3)


def test_what_takes_long_is_not_tried_again():
    measured = Measured(once=100.0, each=1.0)
    assert measured.told({"a": [1, 2, 3, 4]}) is None and measured.tried == [1]
    assert measured.told({"a": []}) is None
