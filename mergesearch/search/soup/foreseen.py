"""What measuring the statistics of a full form will take, before a run begins: tried on one model and few documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mergesearch.search.soup.learning import Documents, size

# of each task so many documents are tried, fewer first: what does not hang on them is told apart so
_FEW = (1, 3)
# bytes that are written and read once for their digest in a second, about
_WRITTEN = 5e8
# a first try that takes longer is the last one
_SECONDS = 20.0


@dataclass(frozen=True)
class Foreseen:
    """About what the statistics of all models take.

    Attributes:
        seconds: to measure and write them.
        documents: how many are looked at, once at least.
        kept: bytes in the run folder.
    """

    seconds: float
    documents: int
    kept: int


class Sizes:
    """Stands for the writer of statistics, and only counts what it is given."""

    def __init__(self) -> None:
        self.kept: int = 0

    def add(self, model: str, names: Sequence[str], tensor: Tensor) -> None:
        self.kept += 4 * tensor.numel()


def foreseen(
    measure: Callable[[Sizes, Documents], None],
    documents: Documents,
    models: int,
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Foreseen | None:
    """What all models take, by what one model takes; None where that would not be known within some seconds.

    Args:
        measure: measures one model on these documents.
        documents: with a known right answer, by task.
        models: how many there are. Each is asked about the tasks that it is best on: mostly one model a task.
        most: documents of each task that are looked at.
    """
    looked_at = sum(min(most, len(ids)) for ids in documents.values())
    if not looked_at:
        return None
    tried: list[tuple[int, float]] = []
    kept = 0
    for few in (_FEW[0], *_FEW):  # the first of all loads libraries
        some = {label: list(ids[:few]) for label, ids in documents.items() if ids}
        sizes, start = Sizes(), clock()
        measure(sizes, some)
        tried.append((size(some), clock() - start))
        kept = sizes.kept
        if tried[0][1] > _SECONDS:
            return None
    (less, short), (more, long) = tried[1:]
    each = max(0.0, long - short) / max(1, more - less)
    # where all tasks have few documents both tries are the same one
    once = max(0.0, short - less * each)
    return Foreseen(models * (once + kept / _WRITTEN) + looked_at * each, looked_at, models * kept)
