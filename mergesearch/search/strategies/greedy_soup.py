"""Greedy soup (Wortsman et al. 2022, recipe 1): ingredients sorted by score; one stays only if the soup does not get
worse on the search documents. An ingredient that leaves the score as it is stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config
from mergesearch.recipe import Recipe, single_rule
from mergesearch.search.baselines import recipe_of
from mergesearch.search.history import History
from mergesearch.search.history import recipe_of as stated_recipe
from mergesearch.search.soup.affine import WHOLE, Affine, affine_of
from mergesearch.search.strategies.base import WAIT, Proposal, Wait, Wanted


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
        found = score([*soup, ingredient])
        if found is not None and found >= best:
            soup, best = [*soup, ingredient], found
    return soup


class _Missing(Exception):
    """A soup that is still to be scored."""

    def __init__(self, soup: Sequence[Ingredient]):
        self.soup = list(soup)


class GreedySoup:
    """Greedy soup over the models and, if asked, the best trials so far."""

    name = "greedy_soup"
    budgeted = True

    def __init__(self, config: Config):
        self.config = config
        self.settings = config.search.greedy_soup

    def next(self, history: History) -> Proposal | Wait | None:
        if self.settings.trials and any(not t.state.is_finished() for t in history.trials[: self._first(history)]):
            return WAIT  # other workers are at trials that may be ingredients
        try:
            self._soup(history)
        except _Missing as missing:
            return self._propose(missing.soup, history)
        return None

    def wants(self, history: History) -> Wanted:
        """At most as many trials as there may be ingredients left to try."""
        most = len(self.config.models) + self.settings.trials - 1
        return Wanted() if self.words(history) else Wanted(max(0, most - len(history.ended(self.name))))

    def words(self, history: History) -> str | None:
        """What the soup is, once it is known."""
        try:
            names = [ingredient.name for ingredient in self._soup(history)]
        except _Missing:
            return None
        if len(names) == 1:
            return f"greedy soup: only {names[0]} stays: every other ingredient makes it worse on the search documents"
        return f"greedy soup: {', '.join(names)} stay, equally weighted" if names else None

    def _soup(self, history: History) -> list[Ingredient]:
        return greedy(self._ingredients(history), lambda mix: self._score(mix, history))

    def _first(self, history: History) -> int:
        """The number of the first soup; of the next trial before there is one."""
        return min((t.number for t in history.ended(self.name)), default=len(history.trials))

    def _ingredients(self, history: History) -> list[Ingredient]:
        trials = [(name, history.named(name)) for name in self.config.models]
        # what was chosen when the first soup was proposed stays chosen
        first = self._first(history)
        others = [t for t in history.complete() if not t.user_attrs.get("name") and t.number < first]
        trials += self._mixable(others)[: self.settings.trials]
        scored = [(name, t, history.value(t)) for name, t in trials if t is not None]
        return [Ingredient(n, v, self._affine(stated_recipe(t))) for n, t, v in scored if v is not None]

    def _mixable(self, others: Sequence[FrozenTrial]) -> list[tuple[str, FrozenTrial]]:
        """The trials that are affine in the parents and have rules for one kind of groups, the best first."""
        found: list[tuple[str, FrozenTrial]] = []
        kinds = {(WHOLE,)}
        for trial in others:
            affine = self._affine(stated_recipe(trial))
            if affine is not None and (affine.selections in kinds or len(kinds) == 1):
                kinds.add(affine.selections)
                found.append((f"trial {trial.number}", trial))
        return found

    def _affine(self, recipe: Recipe) -> Affine | None:
        return affine_of(recipe, tuple(self.config.models))

    def _score(self, mix: Sequence[Ingredient], history: History) -> float | None:
        trial = history.find(self.soup(mix))
        if trial is None:
            raise _Missing(mix)
        if trial.state in (TrialState.RUNNING, TrialState.WAITING):
            raise _Missing(mix)
        return history.value(trial)

    def _propose(self, mix: Sequence[Ingredient], history: History) -> Proposal | Wait:
        recipe = self.soup(mix)
        there = history.find(recipe)
        if there is not None and not there.state.is_finished():
            return WAIT
        return Proposal(recipe, attributes={"ingredients": [ingredient.name for ingredient in mix]})

    def soup(self, mix: Sequence[Ingredient]) -> Recipe:
        """The equal mix of some ingredients; of models alone, the plain average of those."""
        names = [ingredient.name for ingredient in mix]
        models = tuple(self.config.models)
        if all(name in models for name in names):
            weights = {model: float(model in names) for model in models}
            return recipe_of(self.config, single_rule("linear", weight=weights))
        mean = Affine.mean([ingredient.affine for ingredient in mix])
        return recipe_of(self.config, mean.rules(models))


__all__ = ["GreedySoup", "Ingredient", "greedy"]
