"""What can be said against a space before any model is read."""

from __future__ import annotations

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.space.groups import check_components, check_selectors
from mergesearch.space.knobs import knobs_of, subsets_of


def check_space(config: Config) -> None:
    """`UserError` for an unknown method, component, parent or parameter, a range outside what a method allows, methods
    that the sampler cannot choose between."""
    chosen = {name: methods.get(name, "space.methods") for name in config.space.methods}
    for method in chosen.values():
        subsets_of(method, tuple(config.models))
    knobs_of(config.space, chosen)
    check_components(config.space.components)
    check_components(config.search.learned_soup.components, "search.learned_soup")
    check_selectors(config.space, tuple(config.models))
    _check_depth(config)
    _check_sampler(config)


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


def _check_sampler(config: Config) -> None:
    space, sampler = config.space, config.search.sampler
    if "study" not in config.search.strategies:
        return
    if sampler in ("cmaes", "gp") and (len(space.methods) > 1 or space.stack or _chooses_models(config)):
        raise UserError(
            f"search.sampler is {sampler}, which chooses no methods or models ({', '.join(space.methods)}): name "
            "one method that takes all models, or set sampler to auto"
        )
    if config.objective.pareto and sampler in ("cmaes",):
        raise UserError(f"search.sampler is {sampler}, which takes one objective: with pareto use auto, tpe or nsga2")


def _chooses_models(config: Config) -> bool:
    models = tuple(config.models)
    return any(len(subsets_of(methods.get(name, "space.methods"), models)) > 1 for name in config.space.methods)
