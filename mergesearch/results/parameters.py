"""A recipe as a few numbers and words, for whoever shows a trial as a row: dashboard and trackers."""

from __future__ import annotations

from mergesearch.errors import UserError
from mergesearch.recipe import Recipe
from mergesearch.results.loading import recipe_of
from mergesearch.results.page.depth import grid
from mergesearch.results.record import Record

# of a recipe whose groups have methods of their own
SEVERAL = "several"


def parameters_of(record: Record) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers: each model's weight and density, the mean over the model; words: the method."""
    if record.recipe is None:
        return {}, {}
    try:
        recipe = recipe_of(record)
        values = grid(recipe, {}).values
    except UserError:
        return {}, {}
    numbers = {}
    for name, of in values.items():
        for model, rows in zip(recipe.models, of, strict=True):
            there = [value for row in rows for value in row if value is not None]
            if there:
                numbers[f"{name} {model}"] = sum(there) / len(there)
    numbers |= _shared(recipe)
    return numbers, {"method": recipe.methods[0] if len(recipe.methods) == 1 else SEVERAL}


def _shared(recipe: Recipe) -> dict[str, float]:
    """The other numbers of a recipe, where all rules have the same."""
    found: dict[str, set[float]] = {}
    for rule in recipe.rules:
        for key, value in rule.parameters.items():
            if key not in ("weight", "density") and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(key, set()).add(float(value))
    return {key: next(iter(values)) for key, values in found.items() if len(values) == 1}
