"""The rows that every search has to beat: the base, each model alone, the plain average, each method's defaults."""

from __future__ import annotations

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.recipe import Recipe, Rule, single_rule

BASE, AVERAGE = "base", "average"
SLERP = "slerp of the two best"

# what the papers and mergekit's documentation run first
DEFAULTS: dict[str, tuple[str, dict[str, float]]] = {
    "task_arithmetic 0.3": ("task_arithmetic", {"weight": 0.3}),  # Ilharco et al. 2023, section 4
    "task_arithmetic 0.4": ("task_arithmetic", {"weight": 0.4}),  # Yadav et al. 2023 found it best without validation
    "ties 0.2": ("ties", {"weight": 1.0, "density": 0.2}),  # Yadav et al. 2023: top 20 %, lambda 1
    "dare_ties 0.5": ("dare_ties", {"weight": 0.5, "density": 0.5}),
    "della 0.5": ("della", {"weight": 1.0, "density": 0.5}),
    "breadcrumbs 0.9": ("breadcrumbs", {"weight": 0.4, "density": 0.9}),
    "model stock": ("model_stock", {}),
}


def baselines(config: Config) -> dict[str, Recipe]:
    """The baselines' recipes by name, in the order in which they are scored; slerp waits for the models' scores."""
    rules = parents(config)
    rules[AVERAGE] = single_rule("linear", weight=1.0)
    if config.search.defaults:
        for name, (method, parameters) in DEFAULTS.items():
            if methods.get(method, "the baselines").min_models <= len(config.models):
                rules[name] = single_rule(method, **parameters)
    return {name: recipe_of(config, rule) for name, rule in rules.items()}


def parents(config: Config) -> dict[str, tuple[Rule, ...]]:
    """The base and each model alone, as rules by name."""
    rules = {BASE: single_rule("task_arithmetic", weight=0.0)}
    for name in config.models:
        rules[name] = single_rule("linear", weight={other: float(other == name) for other in config.models})
    return rules


def average(config: Config) -> Recipe:
    """The plain average of all models."""
    return recipe_of(config, single_rule("linear", weight=1.0))


def slerp_of(config: Config, first: str, second: str) -> Recipe:
    """The middle of the great circle through two models."""
    chosen = [name for name in config.models if name in (first, second)]
    return recipe_of(config, single_rule("slerp", chosen, t=0.5))


def parent_names(config: Config) -> list[str]:
    """The baselines that fix the scale of the objective."""
    return [BASE, *config.models]


def baseline_count(config: Config) -> int:
    """How many rows stand before the first proposal."""
    return len(baselines(config)) + (config.search.defaults and len(config.models) >= 2)


def recipe_of(config: Config, rules: tuple[Rule, ...]) -> Recipe:
    """A recipe of a run's base, models, seed and dtype."""
    return Recipe(
        base=config.base_model,
        models=config.models,
        rules=rules,
        seed=config.search.seed,
        out_dtype=config.dtype,
        tokenizer=config.tokenizer,
    )
