"""What learning a soup takes and gives, with or without gradients: documents held apart, state on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.errors import UserError
from mergesearch.evaluate.resampling import stream
from mergesearch.recipe import Recipe
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.settings import SoupSettings
from mergesearch.search.store import write_atomically

Documents = Mapping[str, Sequence[int]]  # task -> its documents
# the live model's score of some documents, the more the better
Score = Callable[[Documents], float]


@dataclass(frozen=True)
class LearningStep:
    """How far learning is.

    Attributes:
        step: how many steps, or candidates of CMA-ES, are done.
        of: how many there are at most.
        loss: on the documents held apart, when they were looked at last; None where nothing has a loss.
        score: of the best candidate so far, of CMA-ES.
    """

    step: int
    of: int
    loss: float | None = None
    score: float | None = None


Stepped = Callable[[LearningStep], None]

# the settings that the course of the learning depends on
_COURSE = {
    "optimizer",
    "steps",
    "learning_rate",
    "documents",
    "look_every",
    "patience",
    "candidates",
    "decay",
    "average",
}
# the state is written after every so many steps of Adam
SAVE_EVERY = 5


@dataclass(frozen=True, eq=False)
class Look:
    """What was looked at in the middle of learning.

    Attributes:
        step: after how many steps.
        values: the weights, float64, [cells, models].
        losses: of each validation document, by task, float64, [documents].
    """

    step: int
    values: np.ndarray
    losses: Mapping[str, np.ndarray]

    def data(self) -> dict[str, Any]:
        """For JSON."""
        losses = {task: each.tolist() for task, each in self.losses.items()}
        return {"step": self.step, "values": self.values.tolist(), "losses": losses}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Look:
        """Back from what `data` gave."""
        losses = {task: np.array(each, dtype=np.float64) for task, each in data["losses"].items()}
        return cls(data["step"], np.array(data["values"], dtype=np.float64), losses)


@dataclass(frozen=True)
class SoupResult:
    """What learning found.

    Attributes:
        values: the weights, float64, [cells, models].
        recipe: with these weights.
        history: for each look (each candidate of CMA-ES) `step`, `documents` spent until then, and `validation`: the
            loss there, by task in `losses`, and whether its weights were `kept` (for CMA-ES the `score`, and the best
            so far).
        documents: what it cost over all calls, in document evaluations: a forward pass 1, a backward pass 2 more.
        note: why it ended, in a few words.
        looks: what was looked at, in order; none of CMA-ES.
        scales: what each task's loss was divided by.
    """

    values: np.ndarray
    recipe: Recipe
    history: list[dict[str, Any]]
    documents: int
    note: str
    looks: Sequence[Look] = ()
    scales: Mapping[str, float] = field(default_factory=dict)


def folds_of(
    documents: Documents, count: int, seed: int, most: int | None = None
) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
    """(documents to learn on, documents held out) of each fold: each task's documents in `count` parts of one size give
    or take one, drawn from (seed, task) alone; each part is held out once, `most` of it at most: the rest is learned on
    in every fold.

    Raises:
        UserError: a task with fewer documents than there are folds.
    """
    short = next((label for label, ids in documents.items() if len(ids) < count), None)
    if short is not None:
        raise UserError(
            f"task {short!r} has {len(documents[short])} search documents: a soup learned over {count} folds needs "
            f"{count}: raise limit, or lower search.learned_soup.folds"
        )
    orders = {label: shuffled(ids, "folds", seed, label) for label, ids in documents.items()}
    held = [{label: sorted(order[fold::count][:most]) for label, order in orders.items()} for fold in range(count)]
    return [({label: sorted(set(ids) - set(out[label])) for label, ids in documents.items()}, out) for out in held]


def hold_apart(
    documents: Documents, share: float, seed: int, most: int | None = None
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(documents to learn on, documents to stop by): a share of every task and at most `most`, drawn from (seed, task)
    alone, at least one on either side.

    Raises:
        UserError: a task with fewer than 2 documents, a share not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UserError(f"the share of documents held apart is {share}: give one between 0 and 1")
    learn, stop = {}, {}
    for label, ids in documents.items():
        if len(ids) < 2:
            raise UserError(
                f"task {label!r} has {len(ids)} search documents: a learned soup needs 2, to learn and stop by"
            )
        order = shuffled(ids, "held apart", seed, label)
        count = min(len(ids) - 1, max(1, round(share * len(ids))), most or len(ids))
        stop[label], learn[label] = sorted(order[:count]), sorted(order[count:])
    return learn, stop


def shuffled(ids: Sequence[int], *key: object) -> list[int]:
    """The documents in an order that depends on the key alone."""
    keys = stream(*key).random_raw(len(ids))
    return [ids[position] for position in np.argsort(keys, kind="stable").tolist()]


def minibatch(documents: Documents, step: int, size: int, seed: int) -> dict[str, list[int]]:
    """So many documents of every task: those that come next in a sequence of orders, each of all its documents."""
    drawn = {}
    for label, ids in documents.items():
        count = min(size, len(ids))
        places = range(step * count, (step + 1) * count)
        orders = {place // len(ids): None for place in places}
        ordered = {epoch: shuffled(ids, "soup", seed, label, epoch) for epoch in orders}
        drawn[label] = [ordered[place // len(ids)][place % len(ids)] for place in places]
    return drawn


def size(documents: Documents) -> int:
    """How many documents these are."""
    return sum(map(len, documents.values()))


def fingerprint(coefficients: Coefficients, start: np.ndarray, settings: SoupSettings, seed: int, *rest: Any) -> str:
    """Equal where learning would go the same way."""
    data = {
        "recipe": coefficients.recipe(start).dump(),
        "parameterisation": coefficients.parameterisation,
        "range": [coefficients.low.tolist(), coefficients.high.tolist()],
        "settings": settings.model_dump(mode="json", include=_COURSE),
        "seed": seed,
        "rest": rest,
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class StateDoesNotFit(UserError):
    """A file where learning stood is damaged, or of a soup with other settings or documents.

    Attributes:
        path: that file.
    """

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path: Path = path


@dataclass
class StateFile:
    """Where learning stands, in a JSON file that is written whole or not at all; numbers come back bit for bit."""

    path: Path | None
    identity: str

    def load(self) -> dict[str, Any] | None:
        """What was saved last.

        Raises:
            StateDoesNotFit: the file is of other settings, weights or documents, or no state at all.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            same = data.pop("identity") == self.identity
        except (ValueError, KeyError, AttributeError):
            raise StateDoesNotFit(f"{self.path} holds no state of a learned soup: move it away", self.path) from None
        if not same:
            raise StateDoesNotFit(
                f"{self.path} is of a soup with other settings or documents: move it away, or take them back",
                self.path,
            )
        return data

    def save(self, data: Mapping[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({"identity": self.identity, **data}) + "\n")
