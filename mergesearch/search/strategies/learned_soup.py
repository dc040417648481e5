"""Learned soups: loss by loss, from few coefficients to many, each starting from the best mix so far.

Two losses find different soups: an expected loss may give up a task of which hardly anything is right, cross-entropy
does not. So a soup does not start from one that was learned with another loss.
"""

from __future__ import annotations

from collections.abc import Callable

from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config
from mergesearch.search.history import History, recipe_of
from mergesearch.search.soup.affine import affine_of
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
        cost = self.config.search.learned_soup.closed_form_cost(len(self.config.models), searched(self.config, history))
        there = history.ended(self.name)
        return Wanted(0, sum(still(t, cost, history) for t in there)) if there else Wanted(1, cost)


class LearnedSoups:
    """The soups that `search.learned_soup` asks for. Their recipes are found by the worker that takes the trial.

    Args:
        config: the run's configuration.
        gradients: whether every task allows them.
    """

    name = "learned_soup"
    budgeted = True

    def __init__(self, config: Config, gradients: Callable[[], bool] = lambda: True):
        self.config, self.gradients = config, gradients

    def next(self, history: History) -> Proposal | Wait | None:
        missing = self._missing(history)
        if not missing:
            return None
        if any(t.state in UNDER_WAY and "gradients" not in t.user_attrs for t in history.ended(self.name)):
            return WAIT  # another worker is about to say whether there is a second loss to learn by
        per, loss = missing[0]
        return Proposal(attributes={"per": per, "loss": loss, "start": self._start(history, loss)})

    def wants(self, history: History) -> Wanted:
        """The soups still to be learned and those being learned, at what they cost at most."""
        missing = self._missing(history)
        learning = [t for t in history.ended(self.name) if not t.state.is_finished()]
        if not missing and not learning:
            return Wanted()
        rest = [still(t, self._cost(t.user_attrs.get("loss"), history), history) for t in learning]
        return Wanted(len(missing), sum(rest) + sum(self._cost(loss, history) for _, loss in missing))

    def _cost(self, loss: str | None, history: History) -> int:
        soup, models = self.config.search.learned_soup, len(self.config.models)
        return soup.cost(loss if self.gradients() else None, models, searched(self.config, history))

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


def searched(config: Config, history: History) -> list[int]:
    """The search documents of each task; none before anything was scored."""
    counts = history.documents_of_tasks
    return [counts.get(task.task, 0) for task in config.tasks]


def still(trial: FrozenTrial, cost: int, history: History) -> int:
    """The document evaluations that a trial under way may still take: to be learned at that cost, and scored."""
    if trial.state.is_finished() or "scores" in trial.user_attrs:
        return 0
    return max(0, cost - trial.user_attrs.get("documents_learning", 0)) + history.documents_each
