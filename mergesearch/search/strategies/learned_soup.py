"""Learned soups: one after another, from few coefficients to many, each starting from the best mix so far."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from mergesearch.config import Config
from mergesearch.search.affine import Affine, affine_of
from mergesearch.search.history import History, recipe_of
from mergesearch.search.strategies.base import Proposal

# a model takes part in a mix with at least this weight somewhere
LEAST_WEIGHT = 0.05


class ClosedForm:
    """Fisher-weighted averaging or RegMean: one trial, no search."""

    budgeted = True

    def __init__(self, name: str):
        self.name = name

    def next(self, history: History) -> Proposal | None:
        return None if history.ended(self.name) else Proposal(attributes={"per": self.name})

    def wants(self, history: History) -> int:
        return 0 if history.ended(self.name) else 1


class LearnedSoups:
    """The soups that `search.learned_soup` asks for. Their recipes are found by the worker that takes the trial."""

    name = "learned_soup"
    budgeted = True

    def __init__(self, config: Config):
        self.config = config

    def next(self, history: History) -> Proposal | None:
        there = [t.user_attrs.get("per") for t in history.ended(self.name)]
        for per in self.config.search.learned_soup.per:
            if per not in there:
                return Proposal(attributes={"per": per, "start": self._start(history)})
        return None

    def wants(self, history: History) -> int:
        there = {t.user_attrs.get("per") for t in history.ended(self.name)}
        return len(set(self.config.search.learned_soup.per) - there)

    def _start(self, history: History) -> int | None:
        """The trial to start from: the best mix in which every model takes part; None for the configured weight.

        Where a model is left out the loss may be flat in its weight, and gradients do not bring it back.
        """
        if self.config.search.learned_soup.start is not None:
            return None
        for trial in history.complete():
            affine = self._affine(trial)
            if affine is not None and abs(affine.values).max(axis=0).min() > LEAST_WEIGHT:
                return trial.number
        return None

    def _affine(self, trial: FrozenTrial) -> Affine | None:
        found = affine_of(recipe_of(trial), tuple(self.config.models))
        return found if found is not None and all(s[2] is None for s in found.selections) else None
