"""Closed forms, one trial each: Fisher-weighted averaging and RegMean, on a few search documents of each task.

`fisher` and `regmean` give each model one coefficient a tensor, so that the recipe is a mix as any other;
`fisher_full`, `regmean_full` and `regmean_plus` are what the papers do, and their recipes name files of statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe
from mergesearch.registry import register
from mergesearch.search.budget import Budget, Wanted, still_wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.strategies.base import Cost, Learned, Learns, Measures, Proposal, Strategy, Wait
from mergesearch.search.strategies.learned_soup import searched, settings_of
from mergesearch.search.trials import Trial
from mergesearch.search.work import Work


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
        return self.found(self.run.learner, work)

    @abstractmethod
    def found(self, learner: Learns, work: Work) -> Recipe:
        """The recipe; what gives it is read when it is needed, since it needs torch."""


class FullForm(ClosedForm):
    """A closed form whose statistics are kept, and named by the recipe."""

    @classmethod
    @abstractmethod
    def measures(cls) -> Measures:
        """As `Strategy.measures`; the function is read when it is needed, since it needs torch."""

    def found(self, learner: Learns, work: Work) -> Recipe:
        measured = self.measures()
        return learner.full_form(self.name, measured.kind, measured.how, work)


@register
class Fisher(ClosedForm):
    """Fisher-weighted averaging, from gradients on a few search documents of each task.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", 2022, arXiv:2111.09832; see
    `search.soup.closed_forms`.
    """

    name = "fisher"

    def found(self, learner: Learns, work: Work) -> Recipe:
        from mergesearch.search.soup.closed_forms import fisher

        return learner.closed_form(self.name, fisher, work)


@register
class RegMean(ClosedForm):
    """RegMean, from activations on a few search documents of each task.

    Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", 2023, arXiv:2212.09849; see
    `search.soup.closed_forms`.
    """

    name = "regmean"

    def found(self, learner: Learns, work: Work) -> Recipe:
        from mergesearch.search.soup.closed_forms import regmean

        return learner.closed_form(self.name, regmean, work)


@register
class FisherFull(FullForm):
    """Fisher-weighted averaging as published, each element with a weight of its own.

    Matena and Raffel 2022, arXiv:2111.09832; see `search.soup.full`. What was measured, a number for each model and
    parameter, is kept in the run folder, and the recipe names it by its documents and its hash.
    """

    name = "fisher_full"

    @classmethod
    def measures(cls) -> Measures:
        from mergesearch.search.soup.full import measure_fisher

        return Measures("squares", "fisher", measure_fisher)


@register
class RegMeanFull(FullForm):
    """RegMean as published, a matrix for each layer and model, from activations on a few search documents of each task.

    Jin et al. 2023, arXiv:2212.09849; see `search.soup.full`. The Gram matrices are kept in the run folder, and the
    recipe names them by their documents and their hash.
    """

    name = "regmean_full"

    @classmethod
    def measures(cls) -> Measures:
        from mergesearch.search.soup.full import measure_inputs

        return Measures("inputs", "regmean", measure_inputs)


@register
class RegMeanPlus(FullForm):
    """RegMean++: as regmean_full, each layer's inputs being what the merged layers below it give.

    Nguyen et al. 2025, arXiv:2508.03121; see `search.soup.full`.
    """

    name = "regmean_plus"

    @classmethod
    def measures(cls) -> Measures:
        from mergesearch.search.soup.full import measure_merged_inputs

        return Measures("inputs", "regmean", measure_merged_inputs)
