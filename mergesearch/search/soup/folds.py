"""A soup over folds: every search document is learned from, and every one says how far learning should go.

The documents are cut into a few parts. For each part a soup is learned on all the others, and looked at on the part
itself; the losses of all parts together, each document's of a soup that has not seen it, choose one step for all. What
comes out is the mean of the folds' weights at that step: weights of one model, so that it costs nothing more to run
(bagging: Breiman, "Bagging predictors", 1996; cross-validated by what each has not seen). Nothing is given away for
validation, and what the folds do not agree on averages out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError
from mergesearch.evaluate.losses import Losses
from mergesearch.search.soup.adam import STOPPED, learn, shares_of
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.early_stopping import EarlyStopping
from mergesearch.search.soup.learning import (
    Documents,
    LearningStep,
    Look,
    SoupResult,
    Stepped,
    folds_of,
)
from mergesearch.search.soup.settings import SoupSettings

# each fold goes all the way: where to stop is for all of them together to say
_NEVER = 1_000_000


def learn_by_folds(
    coefficients: Coefficients,
    start: np.ndarray,
    engine: Engine,
    losses: Losses,
    settings: SoupSettings,
    *,
    seed: int,
    documents: Documents,
    weights: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
    state: Path | None = None,
    spent: Callable[[int], None] = lambda count: None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    stepped: Stepped = lambda step: None,
) -> SoupResult:
    """The mean over folds of the weights at the latest look whose held-out losses are not worse than the best look's
    beyond noise, see `EarlyStopping`; `settings.steps` are those of all folds together.

    A fold that breaks off, by losses that are no numbers, counts with what it had until then in no more than the looks
    that it reached. What is stopped from outside counts the folds that are finished; before the first is, that one's
    weights so far.

    Args and errors: as for `adam.learn`, which learns each fold; `documents` are all of them.

    Returns:
        as `adam.learn`: its history has the looks over all folds, `validation` the loss on held-out documents.
    """
    parts = folds_of(losses.known(documents), settings.folds, seed, settings.validation_documents)
    steps = -(-settings.steps // settings.folds)
    mine = settings.model_copy(update={"steps": steps, "patience": _NEVER})
    found: list[SoupResult] = []
    cost, note = 0, ""
    for number, (rest, held) in enumerate(parts):
        if found and stop():
            note = STOPPED
            break
        one = learn(
            coefficients,
            start,
            engine,
            losses,
            mine,
            seed=seed,
            documents=rest,
            validation=held,
            weights=weights,
            scales=scales or (found[0].scales if found else None),
            state=None if state is None else state.with_suffix(f".fold{number}{state.suffix}"),
            spent=spent,
            stop=stop,
            say=say,
            stepped=_within(stepped, number * steps, settings.folds * steps),
        )
        cost += one.documents
        if one.note == STOPPED:
            note = STOPPED
            if not found:
                return one
            break
        found.append(one)
    shares = shares_of(weights, documents)
    factors = {label: share / found[0].scales[label] for label, share in shares.items()}
    looks = together(found)
    stopping = EarlyStopping(_NEVER, factors)
    history: list[dict[str, Any]] = []
    for look in looks:
        if not all(np.isfinite(each).all() for each in look.losses.values()):
            raise CandidateError("a loss on held-out documents is no finite number")
        kept = stopping.look(look.losses, look.values)
        means = {label: float(each.mean()) for label, each in look.losses.items()}
        history.append(
            {
                "step": look.step,
                "documents": cost,
                "validation": stopping.loss(look.losses),
                "losses": means,
                "kept": kept,
            }
        )
    values = stopping.kept
    assert values is not None, "the start is always kept"
    place = max(number for number, entry in enumerate(history) if entry["kept"])
    note = note or f"the mean of {len(found)} folds at step {history[place]['step']} of {steps}"
    return SoupResult(values, coefficients.recipe(values), history, cost, note, looks, found[0].scales)


def together(folds: Sequence[SoupResult]) -> list[Look]:
    """The looks that every fold reached: the mean of the weights, and the losses of all held-out documents."""
    together = []
    for number in range(min(len(fold.looks) for fold in folds)):
        each = [fold.looks[number] for fold in folds]
        losses = {label: np.concatenate([look.losses[label] for look in each]) for label in each[0].losses}
        together.append(Look(each[0].step, np.mean([look.values for look in each], axis=0), losses))
    return together


def _within(stepped: Stepped, before: int, total: int) -> Stepped:
    """Tells how far all folds are."""

    def told(step: LearningStep) -> None:
        loss = step.loss if step.loss is None or math.isfinite(step.loss) else None
        stepped(LearningStep(before + step.step, total, loss, step.score))

    return told
