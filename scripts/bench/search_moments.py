"""When a run of mergesearch had something better, for scripts/bench/search.py: from its trials, after it has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from mergesearch import registry
from mergesearch.evaluate.expected import expect
from mergesearch.evaluate.scores import DocumentScores, TaskScore, load_documents
from mergesearch.search.expectations import without_learned_gold
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.base import Strategy
from mergesearch.search.strategies.baselines import DEFAULTS
from mergesearch.search.trials import State, Trial

Documents = Mapping[str, DocumentScores]


def documents_of(trials: Sequence[Trial], folder: RunFolder) -> dict[int, Documents]:
    """What is left of each trial's documents, of those that were scored themselves."""
    there = [trial.number for trial in trials if trial.same_as is None and folder.documents(trial.number).is_file()]
    return {number: load_documents(folder.documents(number)) for number in there}


@dataclass(frozen=True)
class Moment:
    """When a run had something better.

    Attributes:
        documents, seconds: that it had spent.
        highest: the highest score so far.
        given: whom it would have given.
    """

    documents: int
    seconds: float
    highest: float
    given: Trial


def moments_of(
    trials: Sequence[Trial],
    value_of: Callable[[Trial], float],
    documents: Mapping[int, Documents],
    factors_of: Callable[[Mapping[str, TaskScore]], Mapping[str, float]],
) -> list[Moment]:
    """Each moment at which the highest score, or whom the run would give, was another than before.

    Args:
        value_of: a complete trial's score.
        documents: of each trial that was scored itself; without all of a complete trial's the highest score decides.
        factors_of: of each task in the objective.
    """
    ended = [trial for trial in trials if trial.ended_at is not None and (trial.recipe_data or trial.documents)]
    moments: list[Moment] = []
    spent, seconds, so_far = 0, 0.0, []
    for trial in sorted(ended, key=lambda each: (each.ended_at, each.number)):
        spent, seconds = spent + trial.documents, seconds + seconds_of(trial)
        so_far.append(trial)
        complete = [each for each in so_far if each.state is State.COMPLETE]
        # one that a race stopped changes what is expected of the others, and is looked at with the next that was not
        if trial.state is not State.COMPLETE:
            continue
        highest = max(map(value_of, complete))
        worth = _worth(so_far, complete, documents, factors_of(complete[0].scores))
        given = max(complete, key=lambda each: (worth.get(each.number, 0.0), value_of(each), -each.number))
        if not moments or (moments[-1].highest, moments[-1].given.recipe_id) != (highest, given.recipe_id):
            moments.append(Moment(spent, seconds, highest, given))
    return moments


def _worth(
    so_far: Sequence[Trial], complete: Sequence[Trial], documents: Mapping[int, Documents], factors: Mapping[str, float]
) -> dict[int, float]:
    """What each complete trial was expected to score elsewhere; nothing where that cannot be known."""
    own = [trial for trial in complete if trial.same_as is None]
    if not own or not all(trial.number in documents for trial in own):
        return {}
    there = [trial for trial in so_far if trial.number in documents and trial.same_as is None]
    known = without_learned_gold(there, {trial.number: documents[trial.number] for trial in there})
    found = expect(list(known.values()), factors)
    worth = {number: each.value for number, each in zip(known, found, strict=True)}
    return {trial.number: worth[trial.number if trial.same_as is None else trial.same_as] for trial in complete}


def in_words(trial: Trial, models: Collection[str]) -> str:
    """What a candidate is: its kind, and after a comma which one of that kind.

    Args:
        models: the names of the pool's models.
    """
    if trial.name in models:
        return f"single model, {trial.name}"
    if trial.name in DEFAULTS:
        return f"published default, {trial.name}"
    known = cast("Mapping[str, type[Strategy]]", registry.strategies())
    method = known[trial.strategy].method(trial)
    return f"study, {method}" if trial.strategy == "study" else method


def seconds_of(trial: Trial) -> float:
    """What learning, building and scoring a trial took."""
    return trial.seconds + (trial.learning_seconds or 0.0)
