"""Recipes that are affine in their parents: base + sum of coefficients times task vectors, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergesearch import methods
from mergesearch.recipe import Recipe, Rule, TensorInfo

Selection = tuple[tuple[int, int] | None, tuple[str, ...] | None, str | None]
WHOLE: Selection = (None, None, None)


@dataclass(frozen=True)
class Affine:
    """Coefficients of the models' task vectors for each rule's tensors.

    Attributes:
        selections: (layers, components, tensors) of each rule, in order.
        values: of shape (rules, models), float64.
    """

    selections: tuple[Selection, ...]
    values: np.ndarray

    @classmethod
    def mean(cls, parts: Sequence[Affine]) -> Affine:
        """The mean of several; their rules are those of the one kind among them that is not the whole model.

        Raises:
            ValueError: they have rules for different groups.
        """
        kinds = {part.selections for part in parts if part.selections != (WHOLE,)}
        if len(kinds) > 1:
            raise ValueError("the recipes have rules for different groups")
        selections = next(iter(kinds), (WHOLE,))
        spread = [np.broadcast_to(part.values, (len(selections), part.values.shape[1])) for part in parts]
        return cls(selections, np.mean(spread, axis=0))

    def weights(self, infos: Sequence[TensorInfo], models: Sequence[str]) -> np.ndarray:
        """Each tensor's weights, float64, [tensors, models]; the rules' own, [rules, models], where there are none."""
        rules = self.rules(models)
        rows = [next(number for number, rule in enumerate(rules) if rule.covers(info)) for info in infos]
        return self.values[rows] if rows else self.values

    def rules(self, models: Sequence[str]) -> tuple[Rule, ...]:
        """The same as rules of task arithmetic."""
        return tuple(
            Rule(
                layers=layers,
                components=components,
                tensors=tensors,
                method="task_arithmetic",
                parameters={"weight": {m: float(v) for m, v in zip(models, row, strict=True)}},
            )
            for (layers, components, tensors), row in zip(self.selections, self.values, strict=True)
        )


def affine_of(recipe: Recipe, models: Sequence[str]) -> Affine | None:
    """A recipe's coefficients; None for one that is not affine in its parents (it trims, elects, rotates, stacks)."""
    if recipe.stack is not None or recipe.base is None:
        return None
    rows = [_row(rule, recipe, models) for rule in recipe.rules]
    if any(row is None for row in rows):
        return None
    selections = tuple((rule.layers, rule.components, rule.tensors) for rule in recipe.rules)
    return Affine(selections, np.array(rows, dtype=np.float64))


def _row(rule: Rule, recipe: Recipe, models: Sequence[str]) -> list[float] | None:
    names = rule.models or tuple(recipe.models)
    method = methods.get(rule.method, "the recipe")
    stated = method.complete(rule.parameters, names, "the recipe")
    coefficients = _coefficients(rule.method, stated)
    if coefficients is None:
        return None
    by_name = dict(zip(names, coefficients, strict=True))
    return [by_name.get(model, 0.0) for model in models]


def _coefficients(method: str, stated: dict[str, Any]) -> list[float] | None:
    if method == "task_arithmetic" and not stated.get("normalize"):
        return [stated["lambda"] * weight for weight in stated["weight"]]
    total = sum(stated["weight"]) if method == "linear" else 0.0
    if method == "linear" and stated["normalize"] and abs(total) > 1e-8:
        return [weight / total for weight in stated["weight"]]
    return None
