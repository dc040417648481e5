"""Baselines: the rows that every search has to beat.

The parents come first, since they fix the scale of the objective; then what anybody would try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from mergesearch import methods
from mergesearch.config import Config, SearchConfig
from mergesearch.recipe import AVERAGE, BASE, Recipe, Rule, single_rule
from mergesearch.registry import register
from mergesearch.search.budget import Budget
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.strategies.base import WAIT, Cost, Proposal, Stated, Strategy, Wait
from mergesearch.search.trials import State, Trial

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


@register
class Baselines(Strategy):
    """The base, every model alone, the plain average, and each method's published defaults.

    They are scored on top of `search.trials`, always, and before everything else. A baseline that failed is scored
    again by the next start, unless the objective is fixed.
    """

    name = "baselines"
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "defaults": (
            bool,
            Field(default=True, description="whether each method's published defaults are among the baselines"),
        )
    }
    auto: ClassVar[int | None] = 0
    order = -2
    counts = False
    budgeted = False

    @classmethod
    def joins(cls, search: SearchConfig) -> bool:
        return True

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        return Cost(trials=len(baselines(config)) + _has_slerp(config))

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        there = {trial.name for trial in outlook.history.trials} if outlook.history else set()
        names = [*baselines(outlook.config), *[SLERP] * _has_slerp(outlook.config)]
        return [Ahead(1, races=_may_race(name)) for name in names if name not in there]

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        again = 0 if history.objective is not None else self.run.began
        failed = {t.number for t in history.trials if t.state is State.FAILED and t.number < again}
        there = {trial.name for trial in history.trials if trial.number not in failed}
        for name, recipe in baselines(self.config).items():
            if name not in there:
                return Stated(recipe, name)
        if history.objective is None:
            return WAIT
        return self._slerp(history) if _has_slerp(self.config) and SLERP not in there else None

    def _slerp(self, history: History) -> Proposal | Wait | None:
        scored = [(trial, name) for name in self.config.models if (trial := history.named(name)) is not None]
        if any(not trial.state.ended for trial, _ in scored):
            return WAIT
        values = [(value, name) for trial, name in scored if (value := history.value(trial)) is not None]
        if len(values) < 2:
            return None
        (_, first), (_, second), *_ = sorted(values, key=lambda pair: -pair[0])
        return Stated(slerp_of(self.config, first, second), SLERP)

    @classmethod
    def may_race(cls, trial: Trial) -> bool:
        return _may_race(trial.name)

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} baseline{'s' * (count > 1)}" if count else "a baseline"

    @classmethod
    def method(cls, trial: Trial) -> str:
        return trial.name or super().method(trial)


def _may_race(name: str | None) -> bool:
    return name == SLERP or name in DEFAULTS  # scale, report and races need all documents of the others


def baselines(config: Config) -> dict[str, Recipe]:
    """The baselines' recipes by name, in the order in which they are scored; slerp waits for the models' scores."""
    rules = parents(config)
    rules[AVERAGE] = single_rule("linear", weight=1.0)
    if _wants_defaults(config):
        for name, (method, parameters) in DEFAULTS.items():
            if methods.get(method, "the baselines").min_models <= len(config.models):
                rules[name] = single_rule(method, None, **parameters)
    return {name: config.recipe(rule) for name, rule in rules.items()}


def parents(config: Config) -> dict[str, tuple[Rule, ...]]:
    """The base and each model alone, as rules by name."""
    rules = {BASE: single_rule("task_arithmetic", weight=0.0)}
    for name in config.models:
        rules[name] = single_rule("linear", weight={other: float(other == name) for other in config.models})
    return rules


def slerp_of(config: Config, first: str, second: str) -> Recipe:
    """The middle of the great circle through two models."""
    chosen = [name for name in config.models if name in (first, second)]
    return config.recipe(single_rule("slerp", chosen, t=0.5))


def _wants_defaults(config: Config) -> bool:
    return config.search.key("defaults", bool)


def _has_slerp(config: Config) -> bool:
    # with two models the sphere's middle is what slerp's own range begins with, and still a baseline
    return _wants_defaults(config) and len(config.models) >= 2
