"""Warm start: the best recipes of other runs, tried first."""

from __future__ import annotations

from collections.abc import Sequence

from mergesearch.recipe import Recipe
from mergesearch.search.history import History
from mergesearch.search.strategies.base import Proposal, Wanted


class WarmStart:
    """Recipes given from outside, one after another.

    Args:
        recipes: of this run's parents, the best first.
    """

    name = "warm_start"
    budgeted = True

    def __init__(self, recipes: Sequence[Recipe]):
        self.recipes = recipes

    def next(self, history: History) -> Proposal | None:
        left = self._left(history)
        return Proposal(left[0]) if left else None

    def wants(self, history: History) -> Wanted:
        return Wanted(len(self._left(history)))

    def _left(self, history: History) -> list[Recipe]:
        there = {t.user_attrs.get("recipe_id") for t in history.ended(self.name)}
        return [recipe for recipe in self.recipes if recipe.id not in there]
