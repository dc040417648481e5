"""Learned soups: loss by loss, from few coefficients to many, each starting from the best mix so far.

Two losses find different soups: an expected loss may give up a task of which hardly anything is right, cross-entropy
does not. So a soup does not start from one that was learned with another loss.
"""

from __future__ import annotations

from optuna.trial import TrialState

from mergesearch.config import Config
from mergesearch.search.affine import affine_of
from mergesearch.search.history import History, recipe_of
from mergesearch.search.strategies.base import WAIT, Proposal, Wait, Wanted

# a model takes part in a mix with at least this weight somewhere, or with half its equal share where they are many
LEAST_WEIGHT = 0.05
UNDER_WAY = (TrialState.RUNNING, TrialState.WAITING)


class ClosedForm:
    """Fisher-weighted averaging or RegMean: one trial, no search."""

    budgeted = True

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config

    def next(self, history: History) -> Proposal | None:
        return None if history.ended(self.name) else Proposal(attributes={"per": self.name})

    def wants(self, history: History) -> Wanted:
        """One trial, after a forward and a backward pass of a few documents of each task."""
        few, counts = self.config.search.learned_soup.validation_documents, history.documents_of_tasks
        cost = 3 * sum(min(few, counts.get(task.task, 0)) for task in self.config.tasks)
        return Wanted() if history.ended(self.name) else Wanted(1, cost)


class LearnedSoups:
    """The soups that `search.learned_soup` asks for. Their recipes are found by the worker that takes the trial."""

    name = "learned_soup"
    budgeted = True

    def __init__(self, config: Config):
        self.config = config

    def next(self, history: History) -> Proposal | Wait | None:
        missing = self._missing(history)
        if not missing:
            return None
        if any(t.state in UNDER_WAY and "gradients" not in t.user_attrs for t in history.ended(self.name)):
            return WAIT  # another worker is about to say whether there is a second loss to learn by
        per, loss = missing[0]
        return Proposal(attributes={"per": per, "loss": loss, "start": self._start(history, loss)})

    def wants(self, history: History) -> Wanted:
        """The soups still to be learned, by gradient if they can be, at what they cost at most."""
        missing, counts = self._missing(history), history.documents_of_tasks
        searched = [counts.get(task.task, 0) for task in self.config.tasks]
        soup, models = self.config.search.learned_soup, len(self.config.models)
        return Wanted(len(missing), sum(soup.cost(loss, models, searched) for _, loss in missing))

    def _missing(self, history: History) -> list[tuple[str, str | None]]:
        """The soups still to be learned; a second loss changes nothing where the first could not be used."""
        soups = self.config.search.learned_soup.soups
        ended = [t.user_attrs for t in history.ended(self.name)]
        there = {(found["per"], found.get("loss", soups[0][1])) for found in ended}
        searched = {found["per"] for found in ended if not found.get("gradients", True)}
        return [(per, loss) for per, loss in soups if (per, loss) not in there and per not in searched]

    def _start(self, history: History, loss: str | None) -> int | None:
        """The trial to start from: the best mix in which every model takes part; None for the configured weight.

        Where a model is left out the loss may be flat in its weight, and gradients do not bring it back.
        """
        if self.config.search.learned_soup.start is not None:
            return None
        least = min(LEAST_WEIGHT, 0.5 / len(self.config.models))
        for trial in history.complete():
            if trial.user_attrs.get("loss", loss) != loss:
                continue
            affine = affine_of(recipe_of(trial), tuple(self.config.models))
            if affine is not None and abs(affine.values).max(axis=0).min() > least:
                return trial.number
        return None
