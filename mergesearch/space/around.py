"""The numbers of one recipe, each in a range around what it is (RefineSpace), or moved together (TogetherSpace)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch import methods
from mergesearch.config import Config, SpaceConfig
from mergesearch.methods import Parameter
from mergesearch.recipe import COMPONENTS, Recipe, Rule, TensorInfo
from mergesearch.space.groups import Group, frozen_rules, groups_of, selects
from mergesearch.space.knobs import Knob, Suggests, knobs_of

# of the range that the whole space has for a number, how much lies on each side of where it is
WIDTH = 0.3
# what numbers that move together are multiplied by
FACTORS = (0.5, 1.5)


@dataclass(frozen=True)
class _Turned:
    """One number of one rule."""

    rule: int
    key: str
    model: str | None
    name: str
    parameter: Parameter
    low: float
    high: float
    value: Any

    def suggest(self, trial: Suggests) -> Any:
        return Knob(self.parameter, self.low, self.high).suggest(trial, self.name)

    def scaled(self, factor: float) -> Any:
        """The number times a factor, within its range."""
        return min(max(self.value * factor, self.low), self.high)


class RefineSpace:
    """Recipes with the rules of a given one and other numbers.

    Args:
        config: the run's configuration.
        recipe: where to begin; without a stack.
        label: what the study calls this space; its parameters' names begin with it.

    Attributes:
        origin: the recipe.
        start: the parameters that propose the recipe itself.
    """

    def __init__(self, config: Config, recipe: Recipe, label: str = "refine"):
        self.config: Config = config
        self.origin: Recipe = recipe
        self.label: str = label
        self.methods: dict[str, methods.Method] = {name: methods.get(name, "the recipe") for name in recipe.methods}
        self._frozen = frozen_rules(config.space, tuple(config.models))
        self._knobs = knobs_of(config.space.model_copy(update={"ranges_for": []}), self._known())
        self._complete = [self._completed(rule) for rule in recipe.rules]
        self.turned: list[_Turned] = list(self._turned())
        self.start: dict[str, Any] = {turned.name: turned.value for turned in self.turned}

    def _known(self) -> dict[str, methods.Method]:
        """The recipe's methods, and those that the configuration's ranges speak of."""
        return {**{name: methods.get(name, "space.methods") for name in self.config.space.methods}, **self.methods}

    def _names(self, rule: Rule) -> tuple[str, ...]:
        return rule.models or tuple(self.origin.models)

    def _completed(self, rule: Rule) -> dict[str, Any]:
        return self.methods[rule.method].complete(rule.parameters, self._names(rule), "the recipe")

    def _turned(self) -> Iterator[_Turned]:
        for position, rule in enumerate(self.origin.rules):
            if rule in self._frozen:
                continue
            ranges = _ranges_for(rule, self.config.space)
            for knob in (knob.within(ranges) for knob in self._knobs[rule.method]):
                if knob.fixed:
                    continue
                key, stated = knob.parameter.key, self._complete[position][knob.parameter.key]
                of = self._names(rule) if knob.parameter.per_model else (None,)
                values = stated if knob.parameter.per_model else [stated]
                for model, value in zip(of, values, strict=True):
                    name = ".".join([self.label, rule.label, rule.method, key, *([model] if model else [])])
                    low, high = _bounds(knob, value)
                    yield _Turned(position, key, model, name, knob.parameter, low, high, value)

    def suggest(self, trial: Suggests) -> Recipe:
        """The recipe that a trial proposes; names of parameters read `refine.layers0-1.attention.ties.weight.code`."""
        return self._with((turned, turned.suggest(trial)) for turned in self.turned)

    def _with(self, values: Iterable[tuple[_Turned, Any]]) -> Recipe:
        """The recipe with other numbers."""
        stated: list[dict[str, Any]] = [dict(rule.parameters) for rule in self.origin.rules]
        for turned, value in values:
            if turned.model is None:
                stated[turned.rule][turned.key] = value
            else:
                of = stated[turned.rule].get(turned.key)
                if not isinstance(of, dict) or turned.model not in of:
                    of = dict(zip(self._names(self.origin.rules[turned.rule]), self._each(turned), strict=True))
                stated[turned.rule][turned.key] = {**of, turned.model: value}
        rules = [
            rule.model_copy(update={"parameters": parameters})
            for rule, parameters in zip(self.origin.rules, stated, strict=True)
        ]
        return self.origin.model_copy(update={"rules": tuple(rules)})

    def _each(self, turned: _Turned) -> list[Any]:
        return self._complete[turned.rule][turned.key]

    def parameters(self, recipe: Recipe) -> dict[str, Any] | None:
        """The trial parameters of the recipe it begins with; None for every other."""
        return dict(self.start) if recipe.id == self.origin.id else None

    @property
    def dimension(self) -> int:
        """How many numbers are turned."""
        return len(self.turned)


class TogetherSpace(RefineSpace):
    """Recipes with the rules of a given one, whose numbers move together: all of one parameter, for one model where it
    has one for each, are multiplied by the same factor from 0.5 to 1.5, and stay in the ranges of a RefineSpace.

    For recipes with a number for each tensor, as learned soups are. How the tensors stand to each other was learned;
    how much of each model there is has a few numbers, and a study can find them by the metrics themselves.

    Attributes:
        factors: the parameters' names, `refine.weight.code`, with the numbers that each multiplies.
    """

    def __init__(self, config: Config, recipe: Recipe, label: str = "refine"):
        super().__init__(config, recipe, label)
        self.factors: dict[str, list[_Turned]] = {}
        for turned in self.turned:
            if turned.parameter.kind != "int":
                name = ".".join([label, turned.key, *([turned.model] if turned.model else [])])
                self.factors.setdefault(name, []).append(turned)
        self.start: dict[str, Any] = dict.fromkeys(self.factors, 1.0)

    def suggest(self, trial: Suggests) -> Recipe:
        """The recipe that a trial proposes."""
        factors = {name: trial.suggest_float(name, *FACTORS) for name in self.factors}
        if factors == self.start:
            return self.origin
        return self._with((turned, turned.scaled(factors[name])) for name, of in self.factors.items() for turned in of)

    @property
    def dimension(self) -> int:
        """How many factors there are."""
        return len(self.factors)


def _bounds(knob: Knob, value: float) -> tuple[float, float]:
    """WIDTH of the knob's range on each side of a value; inside that range if the value is, and always as allowed."""
    parameter, reach = knob.parameter, WIDTH * (knob.high - knob.low)
    low, high = value - reach, value + reach
    if knob.low <= value <= knob.high:
        low, high = max(low, knob.low), min(high, knob.high)
    low = low if parameter.low is None else max(low, parameter.low + 1e-6 * parameter.low_open)
    high = high if parameter.high is None else min(high, parameter.high - 1e-6 * parameter.high_open)
    return (round(low), round(high)) if parameter.kind == "int" else (low, high)


def _ranges_for(rule: Rule, space: SpaceConfig) -> dict[str, tuple[float, float]]:
    """The ranges of its own that a rule has: of the first selector that selects all that it can cover."""
    for narrow in space.ranges_for:
        layers = narrow.layers is None or (
            rule.layers is not None and narrow.layers[0] <= rule.layers[0] and rule.layers[1] <= narrow.layers[1]
        )
        if layers and (narrow.components is None or set(rule.components or COMPONENTS) <= set(narrow.components)):
            return narrow.ranges()
    return {}


def split_rules(recipe: Recipe, config: Config, infos: Sequence[TensorInfo], layers: int) -> Recipe:
    """The same merge stated for each of the space's groups, so that each can go its own way from there; what the space
    freezes is frozen.

    Rules that name groups already stay as they are.
    """
    space, rules = config.space, list(recipe.rules)
    if space.layer_groups > 1 or space.components != ["all"]:
        free = [info for info in infos if not any(selects(frozen, info) for frozen in space.freeze)]
        groups = groups_of(free, layers, space.layer_groups, space.components)
        rules = [part for rule in rules for part in (_split(rule, groups) if _whole(rule) else [rule])]
    frozen = frozen_rules(space, tuple(config.models))
    if rules[: len(frozen)] != frozen:
        rules = [*frozen, *rules]
    return recipe.model_copy(update={"rules": tuple(rules)})


def _whole(rule: Rule) -> bool:
    return rule.layers is None and rule.components is None and rule.tensors is None


def _split(rule: Rule, groups: Sequence[Group]) -> list[Rule]:
    if len(groups) == 1:
        return [rule]
    return [rule.model_copy(update={"layers": group.layers, "components": group.members}) for group in groups]
