"""SearchSpace: a trial becomes a recipe, and a recipe the trial's parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergesearch import methods
from mergesearch.config import Config, SpaceConfig
from mergesearch.errors import UserError, unknown
from mergesearch.methods import Method, Parameter
from mergesearch.recipe import COMPONENTS, Recipe, Rule, TensorInfo

DERIVED = ("all", "other")


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Group:
    """The tensors that share parameters: consecutive layers x components (None: every component)."""

    layers: tuple[int, int]
    component: str
    members: tuple[str, ...] | None

    @property
    def label(self) -> str:
        """`layers0-1.attention`; without the component where it is not split."""
        layers = f"layers{self.layers[0]}-{self.layers[1]}"
        return layers if self.component == "all" else f"{layers}.{self.component}"

    def rule(self, method: str, models: Sequence[str], parameters: Mapping[str, Any]) -> Rule:
        return Rule(
            layers=self.layers,
            components=self.members,
            method=method,
            models=tuple(models),
            parameters=dict(parameters),
        )


@dataclass(frozen=True)
class Knob:
    """One number of one method that the study may turn, and the range it may turn it in."""

    parameter: Parameter
    low: float
    high: float

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def suggest(self, trial: Suggests, name: str) -> Any:
        if self.fixed:
            return self.parameter.check(self.low, "space")
        if self.parameter.kind == "int":
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high)


def check_space(config: Config) -> None:
    """What can be said against `config.space` before any model is read: `UserError` as `SearchSpace` raises it."""
    chosen = {name: methods.get(name, "space.methods") for name in config.space.methods}
    for method in chosen.values():
        _subsets(method, tuple(config.models))
    _knobs(config.space, chosen)
    for name in config.space.components:
        if name not in (*COMPONENTS, *DERIVED):
            raise unknown("component", name, (*COMPONENTS, *DERIVED), "space.components")
    if "all" in config.space.components and len(config.space.components) > 1:
        raise UserError("space.components: 'all' stands alone: name components and other, or all")


class SearchSpace:
    """Every recipe that a run may propose.

    Args:
        config: the run's configuration.
        infos: the pool's tensors.
        layers: the number of decoder layers.

    Raises:
        UserError: an unknown method, component or parameter, a range outside what a method allows, more groups than
            layers, components that leave tensors uncovered.
    """

    def __init__(self, config: Config, infos: Sequence[TensorInfo], layers: int):
        check_space(config)
        self.config = config
        self.models = tuple(config.models)
        self.methods = {name: methods.get(name, "space.methods") for name in config.space.methods}
        self._subsets = {name: _subsets(method, self.models) for name, method in self.methods.items()}
        self.groups = _groups(config.space, infos, layers)
        self.knobs = _knobs(config.space, self.methods)

    # --- trial -> recipe ---

    def suggest(self, trial: Suggests) -> Recipe:
        """The recipe that a trial proposes; names of parameters read `layers0-1.attention.ties.weight.code`."""
        shared = self._suggest_method(trial, "") if self.config.space.method_per == "recipe" else None
        rules = []
        for group in self.groups:
            method, names = shared or self._suggest_method(trial, f"{group.label}.")
            rules.append(group.rule(method, names, self._suggest_parameters(trial, group, method, names)))
        return self.recipe(rules)

    def recipe(self, rules: Sequence[Rule]) -> Recipe:
        """A recipe of this run's base, models, seed and dtype."""
        config = self.config
        return Recipe(
            base=config.base_model,
            models=config.models,
            rules=tuple(rules),
            seed=config.search.seed,
            out_dtype=config.dtype,
            tokenizer=config.tokenizer,
        )

    def _suggest_method(self, trial: Suggests, prefix: str) -> tuple[str, tuple[str, ...]]:
        names = list(self.methods)
        method = trial.suggest_categorical(f"{prefix}method", names) if len(names) > 1 else names[0]
        subsets = self._subsets[method]
        if len(subsets) == 1:
            return method, subsets[0]
        chosen = trial.suggest_categorical(f"{prefix}{method}.models", [_joined(subset) for subset in subsets])
        return method, next(subset for subset in subsets if _joined(subset) == chosen)

    def _suggest_parameters(self, trial: Suggests, group: Group, method: str, models: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for knob in self.knobs[method]:
            key = knob.parameter.key
            name = f"{group.label}.{method}.{key}"
            if knob.parameter.per_model:
                found[key] = {model: knob.suggest(trial, f"{name}.{model}") for model in models}
            else:
                found[key] = knob.suggest(trial, name)
        return found

    # --- recipe -> trial parameters ---

    def parameters(self, recipe: Recipe) -> dict[str, Any] | None:
        """The trial parameters that propose a recipe's tensors, or None where the space does not hold it.

        A recipe with one rule for everything, or with this space's own groups, can be expressed.
        """
        reader = _Reader(self, recipe)
        try:
            self.suggest(reader)
        except _NotInSpace:
            return None
        return reader.found

    @property
    def dimension(self) -> int:
        """How many parameters the largest proposal has."""
        return max((sum(1 for _ in self._names(method)) for method in self.methods), default=0)

    def _names(self, method: str) -> Iterator[str]:
        choices = len(self.groups) if self.config.space.method_per == "group" else 1
        yield from ["method"] * (choices * (len(self.methods) > 1))
        yield from [f"{method}.models"] * (choices * (len(self._subsets[method]) > 1))
        for group, knob in itertools.product(self.groups, self.knobs[method]):
            count = len(self._subsets[method][0]) if knob.parameter.per_model else 1
            yield from [f"{group.label}.{method}.{knob.parameter.key}"] * (0 if knob.fixed else count)


class _NotInSpace(Exception):
    pass


class _Reader:
    """Stands in for a trial: answers each suggestion with what the recipe states, and notes it."""

    def __init__(self, space: SearchSpace, recipe: Recipe):
        self.found: dict[str, Any] = {}
        self._values = _stated(space, recipe)

    def _answer(self, name: str) -> Any:
        if name not in self._values:
            raise _NotInSpace(name)
        self.found[name] = self._values[name]
        return self.found[name]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        value = self._answer(name)
        if not low <= value <= high:
            raise _NotInSpace(name)
        return value

    suggest_int = suggest_float

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._answer(name)
        if value not in choices:
            raise _NotInSpace(name)
        return value


def _stated(space: SearchSpace, recipe: Recipe) -> dict[str, Any]:
    """What a recipe says for each parameter name of the space; nothing where its groups do not fit."""
    values: dict[str, Any] = {}
    for group in space.groups:
        rule = next((r for r in recipe.rules if _fits(r, group)), None)
        if rule is None or rule.method not in space.methods:
            return {}
        method, names = space.methods[rule.method], rule.models or tuple(recipe.models)
        complete = method.complete(rule.parameters, names, "the recipe")
        if not _fixed_as_stated(space, rule.method, complete, names):
            return {}
        prefix = "" if space.config.space.method_per == "recipe" else f"{group.label}."
        mine = {f"{prefix}method": rule.method, f"{prefix}{rule.method}.models": _joined(names)}
        for key, value in complete.items():
            name = f"{group.label}.{rule.method}.{key}"
            if method.parameters[key].per_model:
                mine.update({f"{name}.{model}": v for model, v in zip(names, value, strict=True)})
            else:
                mine[name] = value
        if any(values.get(name, value) != value for name, value in mine.items()):
            return {}
        values.update(mine)
    return values


def _fixed_as_stated(space: SearchSpace, name: str, complete: Mapping[str, Any], models: Sequence[str]) -> bool:
    """Whether what the space does not vary stands in the recipe as the space would set it."""
    if tuple(models) not in space._subsets[name]:
        return False
    turned = {knob.parameter.key: knob for knob in space.knobs[name]}
    for key, parameter in space.methods[name].parameters.items():
        expected = parameter.default if key not in turned else turned[key].low if turned[key].fixed else None
        stated = complete[key] if parameter.per_model else [complete[key]]
        if (key not in turned or turned[key].fixed) and any(value != expected for value in stated):
            return False
    return True


def _fits(rule: Rule, group: Group) -> bool:
    whole = rule.layers is None and rule.components is None and rule.tensors is None
    return whole or (rule.layers == group.layers and rule.components == group.members and rule.tensors is None)


def _joined(models: Sequence[str]) -> str:
    return "+".join(models)


def _subsets(method: Method, models: Sequence[str]) -> list[tuple[str, ...]]:
    """Which models a method may be given: all of them, or each choice of as many as it takes."""
    if len(models) < method.min_models:
        raise UserError(
            f"space.methods: {method.name} merges at least {method.min_models} models, the run has {len(models)}: "
            "add models or leave the method out"
        )
    if method.max_models is None or len(models) <= method.max_models:
        return [tuple(models)]
    return list(itertools.combinations(models, method.max_models))


def _groups(space: SpaceConfig, infos: Sequence[TensorInfo], layers: int) -> list[Group]:
    if space.layer_groups > layers:
        raise UserError(
            f"space.layer_groups is {space.layer_groups}, but the models have {layers} layers: use at most that"
        )
    members = _component_members(space.components, sorted({info.component for info in infos}))
    groups = []
    for first, last in _ranges(layers, space.layer_groups):
        for component, names in members.items():
            group = Group((first, last), component, names)
            rule = group.rule("linear", (), {})
            if any(rule.covers(info) for info in infos):
                groups.append(group)
    return groups


def _ranges(layers: int, count: int) -> list[tuple[int, int]]:
    edges = [round(i * layers / count) for i in range(count + 1)]
    return [(a, b - 1) for a, b in itertools.pairwise(edges)]


def _component_members(wanted: Sequence[str], present: Sequence[str]) -> dict[str, tuple[str, ...] | None]:
    if list(wanted) == ["all"]:
        return {"all": None}
    rest = tuple(name for name in present if name not in wanted)
    if rest and "other" not in wanted:
        raise UserError(f"space.components covers no {', '.join(rest)}: add them, or add other")
    found = {name: rest if name == "other" else (name,) for name in wanted}
    return {name: names for name, names in found.items() if names}


def _knobs(space: SpaceConfig, chosen: Mapping[str, Method]) -> dict[str, list[Knob]]:
    ranges = space.ranges()
    known = {key: parameter for method in chosen.values() for key, parameter in method.parameters.items()}
    for key, bounds in ranges.items():
        if key in ("weight", "density", "lambda") and key not in known:
            continue
        if key not in known or known[key].kind in ("bool", "choice"):
            numeric = [name for name, parameter in known.items() if parameter.kind in ("float", "int")]
            fields = [field.alias or name for name, field in SpaceConfig.model_fields.items()]
            raise unknown("key", key, {*numeric, *fields}, "space")
        if any(math.isnan(bound) for bound in bounds):
            raise UserError(f"space.{key}: give a range [low, high] or one number")
        for bound in bounds:
            known[key].check(bound, "space")
    return {name: _method_knobs(method, ranges) for name, method in chosen.items()}


def _method_knobs(method: Method, ranges: Mapping[str, tuple[float, float]]) -> list[Knob]:
    found = []
    for key, parameter in method.parameters.items():
        bounds = ranges.get(key, parameter.search if parameter.kind in ("float", "int") else None)
        if bounds is not None:
            found.append(Knob(parameter, *bounds))
    return found
