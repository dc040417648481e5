"""Recipes by depth: for each model its weight and density in every layer and component, as small as can be.

A page holds many recipes, so layers that are treated alike become one column and components one row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.engine.plan import Step, check
from mergesearch.errors import UserError
from mergesearch.recipe import COMPONENTS, Recipe, TensorInfo
from mergesearch.results.loading import recipe_of
from mergesearch.results.page.anatomy import tensors_of
from mergesearch.results.page.subject import Subject, label_of
from mergesearch.results.record import Record

# characters of JSON that all recipes of a page may take
ROOM = 1_000_000
SHOWN = ("weight", "density")
Cell = tuple[int, str]  # layer, component


# --- one recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """One recipe by depth.

    Attributes:
        models: the models' names, in order.
        rows: components; those that are treated alike share one, `attention, mlp`.
        edges: first layers of the columns, and the number of layers last.
        values: parameter -> model -> row -> column; None where the model, or the tensor, is not there.
    """

    models: tuple[str, ...]
    rows: tuple[str, ...]
    edges: tuple[int, ...]
    values: Mapping[str, list[list[list[float | None]]]]

    def to_data(self) -> dict[str, Any]:
        rounded = {
            name: [[[None if v is None else float(f"{v:.3g}") for v in row] for row in model] for model in of]
            for name, of in self.values.items()
        }
        return {"models": list(self.models), "rows": list(self.rows), "edges": list(self.edges), "values": rounded}


def grid(recipe: Recipe, anatomy: Mapping[str, Any]) -> Grid:
    """A recipe by depth; several tensors of one cell count by their mean.

    Raises:
        UserError: the recipe is none that this version can merge.
    """
    steps = dict(zip(map(id, recipe.rules), check(recipe), strict=False)) if recipe.stack is None else {}
    models = tuple(recipe.models)
    cells: dict[Cell, list[Step]] = {}
    infos = tensors_of(anatomy, recipe) or [TensorInfo("", 0, "all", ())]
    for info in infos:
        rule = next((rule for rule in recipe.rules if rule.covers(info) or not info.name), None)
        if rule is not None and id(rule) in steps:
            cells.setdefault((info.layer, info.component), []).append(steps[id(rule)])
    components = [each for each in (*COMPONENTS, "other", "all") if any(cell[1] == each for cell in cells)]
    layers = 1 + max((cell[0] for cell in cells), default=0)
    values = {
        name: [[[_mean(cells.get((layer, each), ()), name, model) for layer in range(layers)] for each in components]
               for model in models]
        for name in SHOWN
    }  # fmt: skip
    values = {name: of for name, of in values.items() if any(v is not None for m in of for row in m for v in row)}
    return _joined(models, components, layers, values)


def _mean(steps: Sequence[Step], name: str, model: str) -> float | None:
    found = []
    for step in steps:
        if name not in step.parameters or model not in step.models:
            continue
        value = step.parameters[name]
        value = value[step.models.index(model)] if isinstance(value, (list, tuple)) else value
        if isinstance(value, (int, float)):
            found.append(float(value))
    return sum(found) / len(found) if found else None


def _joined(models: tuple[str, ...], components: Sequence[str], layers: int, values: Mapping[str, Any]) -> Grid:
    """Rows that agree wherever both are there become one, then columns that are equal."""
    rows: list[tuple[list[str], dict[tuple[str, int], list[float | None]]]] = []
    for place, component in enumerate(components):
        mine = {(name, m): list(of[m][place]) for name, of in values.items() for m in range(len(models))}
        for names, theirs in rows:
            if all(_agree(mine[key], theirs[key]) for key in mine):
                names.append(component)
                for key, row in mine.items():
                    theirs[key] = [a if b is None else b for a, b in zip(theirs[key], row, strict=True)]
                break
        else:
            rows.append(([component], mine))
    starts = [
        layer
        for layer in range(layers)
        if layer == 0 or any(row[layer] != row[layer - 1] for _, of in rows for row in of.values())
    ]
    kept = {
        name: [[[of[name, m][layer] for layer in starts] for _, of in rows] for m in range(len(models))]
        for name in values
    }
    return Grid(models, tuple(", ".join(names) for names, _ in rows), (*starts, layers), kept)


def _agree(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=True) if a is not None and b is not None)


# --- all of a run -----------------------------------------------------------------------------------------------------


def recipes(subject: Subject, room: int = ROOM) -> list[dict[str, Any]]:
    """Every scored recipe by depth, the winner's first, then the best, as many as there is room for.

    Each has `label`, `trial`, `words` (the parameters that are no weight and no density) and what `Grid.to_data` gives.
    """
    first = list(subject.contenders.values())[:1]
    ordered = [*first, *(each for each in subject.scored if each not in first)]
    found, seen = [], set()
    for record in ordered:
        if record.recipe is None or record.recipe_id in seen:
            continue
        seen.add(record.recipe_id)
        data = _told(record, subject.anatomy)
        room -= len(json.dumps(data)) if data else 0
        if room < 0 and found:
            break
        if data:
            found.append(data)
    return found


def _told(record: Record, anatomy: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        recipe = recipe_of(record)
        data = grid(recipe, anatomy).to_data()
    except UserError:
        return None
    value = f", {record.objective:.4f}" if record.objective is not None else ""
    return {"label": f"{label_of(record)}{value}", "trial": record.number, "words": words(recipe), **data}


def words(recipe: Recipe) -> str:
    """What a recipe says beside weights and densities: methods, and parameters that are the same everywhere."""
    steps = check(recipe)
    said: dict[str, list[str]] = {}
    for step in steps:
        for key, value in step.parameters.items():
            default = step.method.parameters[key].default
            if key in SHOWN or (value == default and key != "lambda"):
                continue
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            if shown not in said.setdefault(key, []):
                said[key].append(shown)
    parts = [" + ".join(dict.fromkeys(step.method.name for step in steps))]
    parts += [f"{key} {' or '.join(values) if len(values) <= 3 else 'varies'}" for key, values in said.items()]
    if recipe.stack is not None:
        rows = (", ".join(f"{name} {first}-{last}" for name, (first, last) in row.items()) for row in recipe.stack)
        parts.append(f"stack of {len(recipe.stack)} rows: {'; '.join(rows)}")
    return ", ".join(parts)
