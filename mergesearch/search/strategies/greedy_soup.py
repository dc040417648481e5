"""Greedy soup: ingredients sorted by score; one stays only if the soup does not get worse on the search documents.

Wortsman et al., "Model soups", 2022, arXiv:2203.05482, recipe 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from mergesearch.config.search import AUTO
from mergesearch.recipe import AVERAGE, Recipe, single_rule
from mergesearch.registry import register
from mergesearch.schema import Strict
from mergesearch.search.budget import Budget, Wanted
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.paying import LEAST, ahead_of
from mergesearch.search.soup.affine import WHOLE, Affine, Selection, affine_of
from mergesearch.search.strategies.base import WAIT, Proposal, Stated, Strategy, Wait
from mergesearch.search.trials import Trial

# the strategies whose best an equal mix has to come near
SWEEP, LEARNED = "sweep", "learned_soup"
# so many standard errors of the difference are out of reach
FAR = 2.0


class GreedySoupSettings(Strict):
    """Greedy soup: an ingredient stays only if the soup does not get worse on the search documents."""

    trials: int = Field(default=0, ge=0, description="so many of the best trials are ingredients beside the models")


@register
class GreedySoup(Strategy):
    """An equal mix of the models, best first; each joins if the mix does not get worse on the search documents.

    With `greedy_soup.trials: N` the N best proposals so far that are plain mixes of the models (of one grouping) are
    ingredients too. One that leaves the score as it is stays. As a part of `auto` it is left out where more was
    found than the best model and the plain average have: by the sweep, by two standard errors of the difference, or
    by a learned soup, by more than noise; not where `trials` asks for other ingredients.
    """

    name = "greedy_soup"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "greedy_soup": (
            GreedySoupSettings,
            Field(default_factory=GreedySoupSettings, description="settings of greedy soups"),
        )
    }
    auto: ClassVar[int | None] = 3

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        settings = outlook.config.search.key("greedy_soup", GreedySoupSettings)
        history = outlook.history
        if history is not None and (_Soups(history).words() or _behind(history) is not None):
            return []
        # the mix of all models is the average, which is scored already: where every model stays there is one less
        most = len(outlook.config.models) + settings.trials - 1
        return [Ahead(max(0, most - len(outlook.of(cls.name))), races=False)]

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        if _behind(history) is not None:
            return None
        soups = _Soups(history)
        if soups.settings.trials and any(not trial.state.ended for trial in soups.before()):
            return WAIT  # other workers are at trials that may be ingredients
        try:
            soups.best()
        except _Missing as missing:
            recipe = soups.recipe(missing.mix)
            there = history.find(recipe)
            if there is not None and not there.state.ended:
                return WAIT
            return Stated(recipe, key={"ingredients": [ingredient.name for ingredient in missing.mix]})
        return None

    def wants(self, history: History) -> Wanted:
        """At most as many trials as there may be ingredients left to try."""
        soups = _Soups(history)
        if soups.words() or _behind(history) is not None:
            return Wanted()
        most = len(self.config.models) + soups.settings.trials - 1
        return Wanted(max(0, most - len(history.of(self.name))))

    @classmethod
    def may_race(cls, trial: Trial) -> bool:
        return False  # it is compared with the soup before it, which need not be the best trial

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} greedy soup{'s' * (count > 1)}" if count else "a greedy soup"

    @classmethod
    def method(cls, trial: Trial) -> str:
        return cls.label(trial)

    @classmethod
    def words(cls, history: History) -> list[str]:
        left_out = _behind(history)
        text = _Soups(history).words() if left_out is None else left_out
        return [text] if text else []


def _behind(history: History) -> str | None:
    """Why no soup is expected to come near what was found before, in words; None where one may, or was begun.

    A greedy soup lies between the models, as their average does: its weights sum to 1. A learned soup that is ahead of
    these found weights that lie elsewhere.
    """
    settings = history.config.search.key("greedy_soup", GreedySoupSettings)
    if AUTO not in history.config.search.strategy or history.of(GreedySoup.name) or settings.trials:
        return None  # with trials among the ingredients it need not lie between the models
    complete = history.complete()
    between = (*history.config.models, AVERAGE)
    best = next((trial for trial in complete if trial.name in between), None)
    if best is None or history.objective is None:
        return None
    # without documents the error is that of scores on different ones, far above the paired one: a part of it is enough
    # for a soup, which was learned to be better than what lies between the models
    for strategy, whose, errors in ((SWEEP, "the sweep's", FAR), (LEARNED, "the learned soup's", LEAST)):
        found = next((trial for trial in complete if trial.strategy == strategy and trial.same_as is None), None)
        if found is None or not found.feasible:
            continue
        ahead, noise = ahead_of(found, best, history)
        if noise and ahead > errors * noise:
            return (
                f"greedy soup: left out: {whose} trial {found.number} is {ahead:.4f} ahead of {best.name}, more than "
                "an equal mix is expected to bring"
            )
    return None


@dataclass(frozen=True)
class Ingredient:
    """A model or an earlier trial, as coefficients of the models' task vectors."""

    name: str
    score: float
    affine: Affine


def greedy(
    ingredients: Sequence[Ingredient], score: Callable[[Sequence[Ingredient]], float | None]
) -> list[Ingredient]:
    """The soup of ingredients sorted by score, best first.

    Args:
        ingredients: any order; the earlier one first among equals.
        score: of the equal mix of some ingredients; None for one that could not be scored, which is left out. It may
            raise to stop here.
    """
    by_score = sorted(ingredients, key=lambda ingredient: -ingredient.score)
    soup, best = by_score[:1], by_score[0].score if by_score else 0.0
    for ingredient in by_score[1:]:
        mixed = score([*soup, ingredient])
        if mixed is not None and mixed >= best:
            soup, best = [*soup, ingredient], mixed
    return soup


class _Missing(Exception):
    """A mix that is still to be scored."""

    def __init__(self, mix: Sequence[Ingredient]):
        self.mix = list(mix)


class _Soups:
    """The greedy soup of a run as far as its trials tell.

    Attributes:
        first: the number of the first mix; of the next trial before there is one.
    """

    def __init__(self, history: History):
        self.history = history
        self.settings = history.config.search.key("greedy_soup", GreedySoupSettings)
        self.models = tuple(history.config.models)
        mine = history.of(GreedySoup.name)
        self.first = mine[0].number if mine else len(history.trials)

    def before(self) -> list[Trial]:
        """The trials before the first mix, but for those of strategies that come later: other workers may be at some at
        any time, and one worker alone would have none."""
        names = self.history.config.search.strategies
        later = names[names.index(GreedySoup.name) + 1 :] if GreedySoup.name in names else ()
        return [trial for trial in self.history.trials[: self.first] if trial.strategy not in later]

    def best(self) -> list[Ingredient]:
        """The ingredients that stay.

        Raises:
            _Missing: that depends on a mix that is not scored yet.
        """
        return greedy(self._ingredients(), self._score)

    def words(self) -> str | None:
        """What the soup is, once it is known."""
        try:
            names = [ingredient.name for ingredient in self.best()]
        except _Missing:
            return None
        if len(names) == 1:
            return f"greedy soup: only {names[0]} stays: every other ingredient makes it worse on the search documents"
        return f"greedy soup: {', '.join(names)} stay, equally weighted" if names else None

    def recipe(self, mix: Sequence[Ingredient]) -> Recipe:
        """The equal mix of some ingredients; of models alone, the plain average of those."""
        names = [ingredient.name for ingredient in mix]
        if all(name in self.models for name in names):
            weights = {model: float(model in names) for model in self.models}
            return self.history.config.recipe(single_rule("linear", weight=weights))
        mean = Affine.mean([ingredient.affine for ingredient in mix])
        return self.history.config.recipe(mean.rules(self.models))

    def _ingredients(self) -> list[Ingredient]:
        named = [(name, trial) for name in self.models if (trial := self.history.named(name)) is not None]
        # what was chosen when the first mix was proposed stays chosen
        chosen = {trial.number for trial in self.before() if trial.name is None}
        others = [trial for trial in self.history.complete() if trial.number in chosen]
        ingredients = []
        for name, trial in [*named, *self._mixable(others)[: self.settings.trials]]:
            value = self.history.value(trial)
            affine = None if value is None else affine_of(trial.recipe, self.models)
            if value is not None and affine is not None:
                ingredients.append(Ingredient(name, value, affine))
        return ingredients

    def _mixable(self, others: Sequence[Trial]) -> list[tuple[str, Trial]]:
        """The trials that are affine in the parents and have rules for one kind of groups, the best first."""
        mixable: list[tuple[str, Trial]] = []
        kinds: set[tuple[Selection, ...]] = {(WHOLE,)}
        for trial in others:
            affine = affine_of(trial.recipe, self.models)
            if affine is not None and (affine.selections in kinds or len(kinds) == 1):
                kinds.add(affine.selections)
                mixable.append((f"trial {trial.number}", trial))
        return mixable

    def _score(self, mix: Sequence[Ingredient]) -> float | None:
        trial = self.history.find(self.recipe(mix))
        if trial is None or not trial.state.ended:
            raise _Missing(mix)
        return self.history.value(trial)


__all__ = ["GreedySoup", "GreedySoupSettings", "Ingredient", "greedy"]
