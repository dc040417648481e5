"""What each trial of a run is expected to score on documents that no search saw: what ranks are given by.

`evaluate.expected` says how that is found; here are a run's trials, and a file in the run folder that keeps what was
found until a trial ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from mergesearch.evaluate.expected import Documents, Expected, expect
from mergesearch.evaluate.scores import load_documents
from mergesearch.evaluate.statistics import figure
from mergesearch.search.history import History
from mergesearch.search.objective import Objective
from mergesearch.search.store import RunFolder, write_atomically
from mergesearch.search.strategies import of_trial
from mergesearch.search.trials import State, Trial

# raised when the same documents give other figures
VERSION = 3


def expectations(history: History, folder: RunFolder) -> dict[int, Expected]:
    """The expected objective of every complete trial, by number, on the scale of the objective.

    Empty where the objective is not fixed yet, or no trial's documents can be read: then the scores are all there is.
    Trials that a race stopped count with what they were scored on, and have no expectation of their own. A complete
    trial whose documents are lost is taken to lose as much as those whose scores are nearest.
    """
    objective = history.objective
    complete = [trial for trial in history.trials if trial.state is State.COMPLETE]
    if objective is None or not complete:
        return {}
    known = [*complete, *(trial for trial in history.trials if trial.state is State.PRUNED and trial.same_as is None)]
    of, kept = _fingerprint(known, objective, folder), _kept(folder)
    if kept.get("of") == of:
        return {int(number): Expected(*values) for number, values in kept["expected"].items()}
    found = _found(complete, known, objective, folder)
    data = {"of": of, "expected": {str(number): astuple(each) for number, each in found.items()}}
    # a folder that may not be written is read as well
    with contextlib.suppress(OSError):
        write_atomically(folder.expected, json.dumps(data) + "\n")
    return found


def _found(complete: list[Trial], known: list[Trial], objective: Objective, folder: RunFolder) -> dict[int, Expected]:
    mean = replace(objective, worst=0.0)
    factors = mean.factors(complete[0].scores)
    own = [trial for trial in known if trial.same_as is None]
    documents = without_learned_gold(own, _read(own, factors, folder))
    scored = [trial for trial in complete if trial.number in documents]
    if not scored:
        return {}
    found = _of(mean, scored[0], documents)
    if objective.worst:
        found = _with_worst(objective, found, scored[0], documents)
    for trial in complete:
        if trial.same_as in found:
            found[trial.number] = found[trial.same_as]
    there = [trial for trial in complete if trial.number in found]
    lost = [trial for trial in complete if trial.number not in found]
    return {trial.number: found[trial.number] for trial in there} | _lost(lost, there, found, objective)


def _of(mean: Objective, first: Trial, documents: Mapping[int, Documents]) -> dict[int, Expected]:
    """By an objective that is a mean of tasks.

    Args:
        first: a complete trial, which tells where the scale begins.
        documents: of each trial by number, the first among them.
    """
    factors = mean.factors(first.scores)
    own = documents[first.number]
    counted = sum(factor * figure(own[task].values, own[task].aggregation) for task, factor in factors.items())
    origin = mean.value(first.scores) - counted
    values = expect([{task: found[task] for task in factors} for found in documents.values()], factors)
    return {number: each.moved(origin) for number, each in zip(documents, values, strict=True)}


def _with_worst(
    objective: Objective, mean: Mapping[int, Expected], first: Trial, documents: Mapping[int, Documents]
) -> dict[int, Expected]:
    """The mean of the tasks, mixed with the task that is expected to be the worst.

    Which that is differs from trial to trial, so each task is expected by itself. Mean and worst task are taken to err
    together, which makes the interval a little too wide. That another task turns out to be the worst is not looked at,
    so the value is a little too high where two are alike.
    """
    tasks = {
        task: _of(replace(objective, weights={task: 1.0}, worst=0.0), first, documents) for task in objective.weights
    }
    share, found = objective.worst, {}
    for number, whole in mean.items():
        lowest = min((each[number] for each in tasks.values()), key=lambda each: each.value)
        found[number] = Expected(
            *((1 - share) * a + share * b for a, b in zip(astuple(whole), astuple(lowest), strict=True))
        )
    return found


def without_learned_gold(trials: Iterable[Trial], documents: Mapping[int, Documents]) -> Mapping[int, Documents]:
    """The documents of so many trials by number; where one of these was learned by how probable the right answers are,
    without that.

    It then no longer says of such a trial, nor of those that were searched for around it, what they will score
    elsewhere: a soup learned by cross-entropy would be told from others by what it was learned by.
    """
    if not any(of_trial(trial).by_answers(trial) for trial in trials if trial.number in documents):
        return documents
    return {
        number: {task: replace(each, gold=None) for task, each in found.items()} for number, found in documents.items()
    }


def _read(trials: Iterable[Trial], factors: Mapping[str, float], folder: RunFolder) -> dict[int, Documents]:
    """The documents of those that have every task's, aggregated as those of the first."""
    found: dict[int, Documents] = {}
    kinds: dict[str, str] = {}
    for trial in trials:
        try:
            documents = load_documents(folder.documents(trial.number))
        except (OSError, ValueError):
            continue
        if not factors.keys() <= documents.keys() or any(not len(documents[task].ids) for task in factors):
            continue
        own = {task: documents[task].aggregation for task in factors}
        kinds = kinds or own
        if own == kinds:
            found[trial.number] = {task: documents[task] for task in factors}
    return found


def _lost(
    lost: list[Trial], there: list[Trial], found: Mapping[int, Expected], objective: Objective
) -> dict[int, Expected]:
    """Of trials without documents, from those that have about the same scores."""
    order = sorted(there, key=lambda trial: objective.value(trial.scores))
    scores = np.array([objective.value(trial.scores) for trial in order])
    shifts = np.array([found[trial.number].value for trial in order]) - scores
    guessed = {}
    for trial in lost:
        score = objective.value(trial.scores)
        nearest = order[int(np.argmin(np.abs(scores - score)))]
        like = found[nearest.number]
        guessed[trial.number] = like.moved(score + float(np.interp(score, scores, shifts)) - like.value)
    return guessed


def _fingerprint(trials: Iterable[Trial], objective: Objective, folder: RunFolder) -> str:
    """Equal where the same documents would be read."""
    files = []
    for trial in trials:
        with contextlib.suppress(OSError):
            about = folder.documents(trial.number).stat()
            files.append([trial.number, trial.state.value, trial.same_as, about.st_size, about.st_mtime_ns])
    data = json.dumps([VERSION, objective.to_data(), files])
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def _kept(folder: RunFolder) -> dict[str, Any]:
    """What was found before; nothing where that is damaged."""
    try:
        kept = json.loads(folder.expected.read_text(encoding="utf-8"))
        return kept if isinstance(kept["expected"], dict) else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
