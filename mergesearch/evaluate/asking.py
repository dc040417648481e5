"""How far a call is that asks the model about documents, told while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Asked:
    """How far a call that asks the model is.

    Attributes:
        tasks: the labels of those whose requests it is at; lm-eval asks those of one type together.
        documents: of all that are asked for, how many are answered.
        of: how many there are.
    """

    tasks: tuple[str, ...]
    documents: int
    of: int


Told = Callable[[Asked], None]


class Answering(Protocol):
    """What answers requests and says so: `RememberingLM`."""

    answered: Callable[[float], None]


class Count:
    """Counts the answers to the requests of one type, and tells how many documents that makes.

    Args:
        told: whom; None: nobody.
        tasks: the labels of the tasks that have such requests.
        before: the documents that were answered before these requests.
        documents: of these requests.
        requests: how many they are.
        of: the documents of all requests.
    """

    def __init__(
        self, told: Told | None, tasks: tuple[str, ...], before: int, documents: int, requests: int, of: int
    ) -> None:
        self._told, self._tasks, self._before, self._of = told, tasks, before, of
        self._documents, self._each = documents, documents / max(1, requests)
        self._answers = 0.0

    def begin(self) -> None:
        """From the first request on; again where memory ran out."""
        self._answers = 0.0
        self._add(0)

    @contextmanager
    def of_answers(self, model: Answering) -> Iterator[None]:
        """Counts what a model answers until the block ends."""
        if self._told is not None:
            model.answered = self._add
        try:
            yield
        finally:
            model.answered = lambda count: None

    def _add(self, count: float) -> None:
        if self._told is not None:
            self._answers += count
            # a part of a document rounds down, and what rounding errors took from a whole one does not
            done = min(self._documents, int(self._answers * self._each + 1e-6))
            self._told(Asked(self._tasks, self._before + done, self._of))


def counts_of(
    requests: Mapping[str, Sequence[Any]], documents: Mapping[str, Mapping[Any, str]], told: Told | None
) -> dict[str, Count]:
    """A count for each type of request, in the order in which they are asked.

    Args:
        requests: by type.
        documents: by type, each with its task's label.
        told: whom; None: nobody.
    """
    of, before, counts = sum(map(len, documents.values())), 0, {}
    for kind, asked in requests.items():
        there = documents.get(kind, {})
        counts[kind] = Count(told, tuple(dict.fromkeys(there.values())), before, len(there), len(asked), of)
        before += len(there)
    return counts
