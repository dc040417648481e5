"""The rows that every search has to beat: the base, each model alone, the plain average."""

from __future__ import annotations

from mergesearch.config import Config
from mergesearch.recipe import Recipe, Rule, single_rule

BASE, AVERAGE = "base", "average"


def baselines(config: Config) -> dict[str, Recipe]:
    """The baselines' recipes by name, in the order in which they are scored."""
    rules = {BASE: single_rule("task_arithmetic", weight=0.0)}
    for name in config.models:
        rules[name] = single_rule("linear", weight={other: float(other == name) for other in config.models})
    rules[AVERAGE] = single_rule("linear", weight=1.0)
    return {name: _recipe(config, rule) for name, rule in rules.items()}


def parent_names(config: Config) -> list[str]:
    """The baselines that fix the scale of the objective."""
    return [BASE, *config.models]


def _recipe(config: Config, rules: tuple[Rule, ...]) -> Recipe:
    return Recipe(
        base=config.base_model,
        models=config.models,
        rules=rules,
        seed=config.search.seed,
        out_dtype=config.dtype,
        tokenizer=config.tokenizer,
    )
