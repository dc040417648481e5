"""Closed forms, one trial each: Fisher-weighted averaging and RegMean, on a few search documents of each task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search.budget import Budget, Wanted, still_wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.strategies.base import Cost, Learned, Proposal, Strategy, Wait
from mergesearch.search.strategies.learned_soup import searched, settings_of
from mergesearch.search.trials import Trial
from mergesearch.search.work import Work

if TYPE_CHECKING:
    from mergesearch.search.soup.closed_forms import Averaging


class ClosedForm(Strategy):
    """One trial whose recipe follows from the models on a few documents."""

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        spent = settings_of(config).closed_form_cost(len(config.models), documents)
        return Cost(documents=spent, words=f"about {spent:,} for {cls.name}")

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        spent = cls.learning(outlook.config, outlook.documents, {})
        return [] if outlook.of(cls.name) else [Ahead(1, spent)]

    @classmethod
    def learning(cls, config: Config, documents: Sequence[int], key: Mapping[str, Any]) -> int:
        # each model is asked about the documents of the tasks it is best on: mostly one model a task
        return settings_of(config).closed_form_cost(1, documents)

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        return None if history.of(self.name) or self.run.learner is None else Learned(self._find)

    def wants(self, history: History) -> Wanted:
        if self.run.learner is None:
            return Wanted()
        cost = settings_of(self.config).closed_form_cost(len(self.config.models), searched(history))
        mine = history.of(self.name)
        return Wanted(0, sum(still_wanted(trial, cost, history) for trial in mine)) if mine else Wanted(1, cost)

    def again(self, trial: Trial, history: History) -> Learned:
        return Learned(self._find)

    @classmethod
    def method(cls, trial: Trial) -> str:
        return cls.label(trial)

    def _find(self, work: Work) -> Recipe:
        if self.run.learner is None:
            raise CandidateError("soups cannot be learned here")
        return self.run.learner.closed_form(self.name, self.solve(), work)

    @classmethod
    @abstractmethod
    def solve(cls) -> Averaging:
        """What gives the weights; read when it is needed, since it needs torch."""


@register
class Fisher(ClosedForm):
    """Fisher-weighted averaging, from gradients on a few search documents of each task.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2022, arXiv:2111.09832; see
    `search.soup.closed_forms`.
    """

    name = "fisher"

    @classmethod
    def solve(cls) -> Averaging:
        from mergesearch.search.soup.closed_forms import fisher

        return fisher


@register
class RegMean(ClosedForm):
    """RegMean, from activations on a few search documents of each task.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023, arXiv:2212.09849; see
    `search.soup.closed_forms`.
    """

    name = "regmean"

    @classmethod
    def solve(cls) -> Averaging:
        from mergesearch.search.soup.closed_forms import regmean

        return regmean
