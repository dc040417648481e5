"""The learned soup without gradients: CMA-ES over the same coefficients, for any model and any metric.

Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, arXiv:1604.00772, by the package cmaes; with many coefficients
its separable variant (Ros and Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity",
2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cmaes import CMA, SepCMA

from mergesearch.engine.live import Engine
from mergesearch.errors import CandidateError, UserError
from mergesearch.search.soup.coefficients import Coefficients
from mergesearch.search.soup.learning import (
    Documents,
    LearningStep,
    Score,
    SoupResult,
    StateFile,
    Stepped,
    fingerprint,
    size,
)
from mergesearch.search.soup.settings import SoupSettings

# a full covariance matrix takes its square in memory and its cube in time
_MOST_FULL = 200
# the first step size, in the coefficients' unit
_SIGMA = 1 / 6


def search(
    coefficients: Coefficients,
    start: np.ndarray,
    engine: Engine,
    score: Score,
    settings: SoupSettings,
    seed: int,
    documents: Documents,
    state: Path | None,
    spent: Callable[[int], None],
    stop: Callable[[], bool],
    say: Callable[[str], None],
    stepped: Stepped,
) -> SoupResult:
    """The weights with the best score of all candidates, the start included; population 4 + 3 ln n.

    Every candidate is scored on all the documents. One that cannot be made or scored counts as worse than all others.
    After a stop it goes on from the scores in the state: the same candidates are proposed again and not scored twice.

    Args and errors: as for `adam.learn`; `CandidateError` where the start cannot be scored.
    """
    walk = _Walk(coefficients, start, seed)
    file = StateFile(
        state, fingerprint(coefficients, start, settings, seed, {k: list(v) for k, v in documents.items()})
    )
    saved = file.load() or {"scores": []}
    known: list[float | None] = saved["scores"]
    each, history = size(documents), []
    if known:
        spent(each * len(known))
        say(f"going on at candidate {len(known)} of {settings.candidates}")
    best, best_values, counted = -math.inf, start, len(known)
    for number in range(settings.candidates):
        values = walk.propose()
        if number >= len(known):
            if stop():
                return _learned(coefficients, best_values, history, each * number, "stopped from outside")
            known.append(_score(coefficients, values, engine, score, documents, number))
            spent(each)
            file.save({"scores": known})  # each takes as long as a trial
        reached = known[number]
        walk.tell(reached)
        if reached is not None and reached > best:
            best, best_values = reached, values
        history.append({"step": number, "documents": each * (number + 1), "score": reached, "best": best})
        if number >= counted:
            stepped(LearningStep(number + 1, settings.candidates, score=best))
    return _learned(coefficients, best_values, history, each * len(known), f"all {settings.candidates} candidates")


def _score(
    coefficients: Coefficients,
    values: np.ndarray,
    engine: Engine,
    score: Score,
    documents: Documents,
    number: int,
) -> float | None:
    """None where the candidate cannot be made or scored."""
    try:
        engine.load(coefficients.recipe(values))
        reached = float(score(documents))
    except CandidateError:
        if number == 0:
            raise
        return None
    if number == 0 and not math.isfinite(reached):
        raise CandidateError(f"the start of the learned soup has the score {reached}")
    return reached if math.isfinite(reached) else None


class _Walk:
    """Proposes the start, then CMA-ES's candidates; the same ones after the same scores."""

    def __init__(self, coefficients: Coefficients, start: np.ndarray, seed: int):
        self._coefficients, self._start = coefficients, start
        raw = coefficients.raw(start)
        self._raw = raw.numpy()
        softmax = coefficients.parameterisation == "softmax"
        self._turned = np.ones(raw.shape, dtype=bool) if softmax else coefficients.free
        mean = self._raw[self._turned]
        if not mean.size:
            raise UserError("every weight of the learned soup is frozen: free some of them")
        # in one dimension CMA-ES is not defined: a second one that does nothing
        self._mean = mean if mean.size > 1 else np.append(mean, 0.0)
        kind: Any = CMA if self._mean.size <= _MOST_FULL else SepCMA
        self._cma = kind(mean=self._mean.copy(), sigma=_SIGMA, bounds=self._bounds(), seed=seed)
        self._begun, self._asked = False, self._mean
        self._told: list[tuple[np.ndarray, float]] = []

    def propose(self) -> np.ndarray:
        if not self._begun:
            return self._start
        self._asked = self._cma.ask()
        raw = self._raw.copy()
        raw[self._turned] = self._asked[: int(self._turned.sum())]
        return self._coefficients.values(torch.from_numpy(raw))

    def tell(self, score: float | None) -> None:
        if not self._begun:
            self._begun = True
            return
        self._told.append((self._asked, math.inf if score is None else -score))
        if len(self._told) == self._cma.population_size:
            worst = max((loss for _, loss in self._told if math.isfinite(loss)), default=0.0)
            self._cma.tell([(x, loss if math.isfinite(loss) else worst + 1.0) for x, loss in self._told])
            self._told = []

    def _bounds(self) -> np.ndarray | None:
        if self._coefficients.parameterisation == "softmax":
            return None
        ends = np.stack([self._coefficients.low[self._turned], self._coefficients.high[self._turned]], axis=1)
        if np.isinf(ends).all():
            return None
        return ends if len(ends) > 1 else np.vstack([ends, [-np.inf, np.inf]])


def _learned(
    coefficients: Coefficients, values: np.ndarray, history: list[dict[str, Any]], documents: int, note: str
) -> SoupResult:
    return SoupResult(values, coefficients.recipe(values), history, documents, note)
