"""What can be said against a space before any model is read."""

from __future__ import annotations

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.space.groups import check_components, check_selectors
from mergesearch.space.knobs import knobs_of, subsets_of


def check_space(config: Config) -> None:
    """`UserError` for an unknown method, component, parent or parameter, or a range outside what a method allows."""
    chosen = {name: methods.get(name, "space.methods") for name in config.space.methods}
    informed = next((name for name, method in chosen.items() if method.data is not None), None)
    if informed is not None:
        raise UserError(
            f"space.methods names {informed}, which goes by statistics of documents: leave it out, and name in "
            "search.strategy one that measures them (`mergesearch strategies`), before study"
        )
    for method in chosen.values():
        subsets_of(method, tuple(config.models))
    knobs_of(config.space, chosen)
    check_components(config.space.components)
    check_selectors(config.space, tuple(config.models))
    _check_depth(config)


def _check_depth(config: Config) -> None:
    space = config.space
    if space.grow and (space.depth != "groups" or space.stack):
        raise UserError(f"space.grow refines {'a stack' if space.stack else f'depth {space.depth}'} no further: leave "
                        "one of them out; grow goes with layer_groups and components")  # fmt: skip
    if space.grow and config.objective.pareto:
        raise UserError("space.grow refines around the one best recipe, and objective is pareto: leave one of them out")
    if space.depth == "groups":
        return
    if space.layer_groups > 1:
        raise UserError(
            f"space.layer_groups is {space.layer_groups} and depth {space.depth}: layer_groups goes with depth groups"
        )
    if any(narrow.layers for narrow in space.ranges_for):
        raise UserError(f"space.ranges_for names layers and depth is {space.depth}: layers go with depth groups")
    if space.depth == "control_points" and space.method_per == "group":
        raise UserError("space.method_per is group and depth control_points: points of one method can be interpolated")
