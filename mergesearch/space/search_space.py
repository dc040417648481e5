"""SearchSpace: methods and their numbers for groups of tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesearch import methods
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe, Rule, TensorInfo
from mergesearch.space.check import check_space
from mergesearch.space.groups import (
    Group,
    Members,
    check_layers,
    component_label,
    component_members,
    frozen_rules,
    groups_of,
    selects,
)
from mergesearch.space.knobs import Knob, Suggests, knobs_of, subsets_of


@dataclass(frozen=True)
class Place:
    """Where parameters are stated: a group, a control point, or one side of a split.

    Attributes:
        label: how the names of its parameters begin.
        component, members: the components it speaks of.
        at: a layer where what it states holds unmixed.
        ranges: of its own, by parameter.
    """

    label: str
    component: str
    members: Members
    at: int
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlaceRule:
    """What a trial states for one place."""

    place: Place
    method: str
    models: tuple[str, ...]
    parameters: dict[str, Any]


class SearchSpace:
    """Every recipe that a run may propose.

    >>> from mergesearch import Config, Pool, SearchSpace
    >>> config = Config(base_model="zoo:base", models={"order": "zoo:order", "letters": "zoo:letters"},
    ...                 tasks=[{"task": "zoo_order"}], space={"methods": ["ties"], "layer_groups": 2})
    >>> pool = Pool.load(config.base_model, config.models, device="cpu")
    >>> space = SearchSpace(config, pool.infos, pool.layers)

    Args:
        config: the run's configuration.
        infos: the pool's tensors.
        layers: the number of decoder layers.
        label: what the study calls this space, where it searches several.

    Raises:
        UserError: an unknown method, component or parameter, a range outside what a method allows, more groups than
            layers, components that leave tensors uncovered.
    """

    def __init__(self, config: Config, infos: Sequence[TensorInfo], layers: int, label: str = "space"):
        check_space(config)
        check_layers(config.space, layers)
        self.config: Config = config
        self.label: str = label
        self.layers: int = layers
        self.models: tuple[str, ...] = tuple(config.models)
        self.methods: dict[str, methods.Method] = {
            name: methods.get(name, "space.methods") for name in config.space.methods
        }
        self._subsets = {name: subsets_of(method, self.models) for name, method in self.methods.items()}
        self._infos = list(infos)
        self._frozen = frozen_rules(config.space, self.models)
        self.groups: list[Group] = groups_of(self._free(), layers, config.space.layer_groups, config.space.components)
        if not self.groups:
            raise UserError("space.freeze leaves no tensor to search for: freeze fewer")
        self._check_narrow()
        self.places: list[Place] = self._places()
        self.knobs: dict[str, list[Knob]] = knobs_of(config.space, self.methods)

    def _free(self) -> list[TensorInfo]:
        """The tensors that are not frozen."""
        return [i for i in self._infos if not any(selects(frozen, i) for frozen in self.config.space.freeze)]

    def _places(self) -> list[Place]:
        space = self.config.space
        if space.depth == "groups":
            return [Place(g.label, g.component, g.members, g.layers[0], self._narrow(g)) for g in self.groups]
        if space.depth == "split":
            where = {"below": 0, "above": self.layers - 1} if self.layers > 1 else {"below": 0}
        else:
            last = min(space.control_points, self.layers) - 1
            where = {f"depth{n}": round(n * (self.layers - 1) / max(1, last)) for n in range(last + 1)}
        members = component_members(space.components, self._free())
        return [
            Place(component_label(name, component), component, names, at, self._narrow_component(names))
            for name, at in where.items()
            for component, names in members.items()
        ]

    def _check_narrow(self) -> None:
        """`UserError` where `ranges_for` cuts through a group, whose tensors share their parameters."""
        for position, narrow in enumerate(self.config.space.ranges_for):
            for group in self.groups:
                inside = [selects(narrow, info) for info in self._free() if group.covers(info)]
                if any(inside) and not all(inside):
                    raise UserError(
                        f"space.ranges_for.{position} selects a part of the group {group.label}, which has one set of "
                        "parameters: select all of it, or set layer_groups and components so that it falls apart there"
                    )

    def _narrow(self, group: Group) -> dict[str, tuple[float, float]]:
        """The ranges of its own that a group has: of the first selector that selects all of its tensors."""
        mine = [info for info in self._free() if group.covers(info)]
        for narrow in self.config.space.ranges_for:
            if all(selects(narrow, info) for info in mine):
                return narrow.ranges()
        return {}

    def _narrow_component(self, members: Members) -> dict[str, tuple[float, float]]:
        return self._narrow(Group((0, self.layers - 1), "", members))

    # --- trial -> recipe ---

    def suggest(self, trial: Suggests) -> Recipe:
        """The recipe that a trial proposes; names of parameters read `layers0-1.attention.ties.weight.code`."""
        shared = self._suggest_method(trial, "") if self.config.space.method_per == "recipe" else None
        split = self._suggest_split(trial)
        stated = []
        for place in self.places:
            method, names = shared or self._suggest_method(trial, f"{place.label}.")
            stated.append(PlaceRule(place, method, names, self._suggest_parameters(trial, place, method, names)))
        return self.recipe([*self._frozen, *self._rules(stated, split)])

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

    def _suggest_split(self, trial: Suggests) -> int:
        """The first layer of the upper mix."""
        if self.config.space.depth != "split" or self.layers < 2:
            return self.layers
        return trial.suggest_int("split", 1, self.layers - 1) if self.layers > 2 else 1

    def _suggest_method(self, trial: Suggests, prefix: str) -> tuple[str, tuple[str, ...]]:
        names = list(self.methods)
        method = trial.suggest_categorical(f"{prefix}method", names) if len(names) > 1 else names[0]
        subsets = self._subsets[method]
        if len(subsets) == 1:
            return method, subsets[0]
        chosen = trial.suggest_categorical(f"{prefix}{method}.models", [_joined(subset) for subset in subsets])
        return method, next(subset for subset in subsets if _joined(subset) == chosen)

    def _suggest_parameters(self, trial: Suggests, place: Place, method: str, models: Sequence[str]) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for knob in self._knobs(place, method):
            key = knob.parameter.key
            name = f"{place.label}.{method}.{key}"
            if knob.parameter.per_model:
                parameters[key] = {model: knob.suggest(trial, f"{name}.{model}") for model in models}
            else:
                parameters[key] = knob.suggest(trial, name)
        return parameters

    def _knobs(self, place: Place, method: str) -> list[Knob]:
        return [knob.within(place.ranges) for knob in self.knobs[method]]

    # --- what is stated -> rules ---

    def _rules(self, stated: Sequence[PlaceRule], split: int) -> list[Rule]:
        if self.config.space.depth == "groups":
            pairs = zip(self.groups, stated, strict=True)
            return [group.rule(s.method, s.models, s.parameters) for group, s in pairs]
        if self.config.space.depth == "split":
            sides = {"below": (0, split - 1), "above": (split, self.layers - 1)}
            return [_rule(s, sides[s.place.label.split(".")[0]]) for s in stated]
        by_component: dict[str, list[PlaceRule]] = {}
        for s in stated:
            by_component.setdefault(s.place.component, []).append(s)
        return [
            _rule(_between(points, layer, self.layers), (layer, layer))
            for layer in range(self.layers)
            for points in by_component.values()
        ]

    # --- recipe -> trial parameters ---

    def parameters(self, recipe: Recipe) -> dict[str, Any] | None:
        """The trial parameters that propose a recipe's tensors, or None where the space does not hold it."""
        as_trial = _RecipeAsTrial(self, recipe)
        try:
            same = self._same(self.suggest(as_trial), recipe)
        except _NotInSpace:
            return None
        return as_trial.given if same else None

    def _same(self, ours: Recipe, theirs: Recipe) -> bool:
        """Whether two recipes do the same to every tensor."""
        if theirs.stack is not None or ours.tokenizer != theirs.tokenizer:
            return False
        seen: dict[tuple[int, int], bool] = {}
        for info in self._infos:
            a, b = ours.rule_for(info), theirs.rule_for(info)
            pair = (id(a), id(b))
            if pair not in seen:
                seen[pair] = _alike(a, b, self.models)
            if not seen[pair]:
                return False
        return True

    @property
    def dimension(self) -> int:
        """How many parameters the largest proposal has."""
        return max((sum(1 for _ in self._names(method)) for method in self.methods), default=0)

    def _names(self, method: str) -> Iterator[str]:
        choices = len(self.places) if self.config.space.method_per == "group" else 1
        yield from ["method"] * (choices * (len(self.methods) > 1))
        yield from [f"{method}.models"] * (choices * (len(self._subsets[method]) > 1))
        yield from ["split"] * (self.config.space.depth == "split" and self.layers > 2)
        for place in self.places:
            for knob in self._knobs(place, method):
                count = len(self._subsets[method][0]) if knob.parameter.per_model else 1
                yield from [f"{place.label}.{method}.{knob.parameter.key}"] * (0 if knob.fixed else count)


class OneMethod(SearchSpace):
    """The part of a space that has the method of one of its recipes: numbers alone, to refine from there.

    Args:
        config, infos, layers, label: as for `SearchSpace`.
        recipe: where to begin.

    Attributes:
        origin: the recipe.
        start: the parameters that propose it.

    Raises:
        LookupError: the space does not hold the recipe, or leaves more than numbers to choose.
    """

    def __init__(self, config: Config, recipe: Recipe, infos: Sequence[TensorInfo], layers: int, label: str = "refine"):
        super().__init__(config, infos, layers, label)
        point = self.parameters(recipe)
        if point is None or config.space.method_per == "group":
            raise LookupError("the recipe is no point of a space with one method for the recipe")
        name = point.get("method", next(iter(self.methods)))
        if len(self._subsets[name]) > 1:
            raise LookupError(f"{name} leaves a choice of models")
        self.methods: dict[str, methods.Method] = {name: self.methods[name]}
        self.origin: Recipe = recipe
        self.start: dict[str, Any] = self.parameters(recipe) or {}


class _NotInSpace(Exception):
    pass


class _RecipeAsTrial:
    """Stands in for a trial: answers each suggestion with what the recipe states, and notes it."""

    def __init__(self, space: SearchSpace, recipe: Recipe):
        self.given: dict[str, Any] = {}
        self._values = _stated(space, recipe)

    def _answer(self, name: str) -> Any:
        if name not in self._values:
            raise _NotInSpace(name)
        self.given[name] = self._values[name]
        return self.given[name]

    def suggest_float(self, name: str, low: float, high: float) -> float:
        value = self._answer(name)
        if not low <= value <= high:
            raise _NotInSpace(name)
        return value

    def suggest_int(self, name: str, low: int, high: int) -> int:
        value = self._answer(name)
        if not low <= value <= high:
            raise _NotInSpace(name)
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._answer(name)
        if value not in choices:
            raise _NotInSpace(name)
        return value


def _stated(space: SearchSpace, recipe: Recipe) -> dict[str, Any]:
    """What a recipe says for each parameter name of the space; nothing where it has methods of its own."""
    values: dict[str, Any] = {"split": _split_of(recipe, space.layers)}
    free = space._free()
    for place in space.places:
        inside = [i for i in free if place.members is None or i.component in place.members]
        if not inside:
            continue
        rule = recipe.rule_for(min(inside, key=lambda info: abs(info.layer - place.at)))
        if rule.method not in space.methods:
            return {}
        method, names = space.methods[rule.method], rule.models or tuple(recipe.models)
        prefix = "" if space.config.space.method_per == "recipe" else f"{place.label}."
        values.setdefault(f"{prefix}method", rule.method)
        values.setdefault(f"{prefix}{rule.method}.models", _joined(names))
        for key, value in method.complete(rule.parameters, names, "the recipe").items():
            name = f"{place.label}.{rule.method}.{key}"
            if method.parameters[key].per_model:
                values.update({f"{name}.{model}": v for model, v in zip(names, value, strict=True)})
            else:
                values[name] = value
    return values


def _split_of(recipe: Recipe, layers: int) -> int:
    """The first layer of the second range of layers that a recipe's rules name; the middle where they name none."""
    starts = sorted({rule.layers[0] for rule in recipe.rules if rule.layers} - {0})
    return starts[0] if starts else max(1, layers // 2)


def _alike(a: Rule, b: Rule, models: Sequence[str]) -> bool:
    if a.method != b.method or (a.models or tuple(models)) != (b.models or tuple(models)):
        return False
    method = methods.get(a.method, "the recipe")
    ours, theirs = (method.complete(r.parameters, r.models or tuple(models), "the recipe") for r in (a, b))
    return all(_close(ours[key], theirs[key]) for key in ours)


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15)
    return a == b


def _rule(stated: PlaceRule, layers: tuple[int, int]) -> Rule:
    group = Group(layers, stated.place.component, stated.place.members)
    return group.rule(stated.method, stated.models, stated.parameters)


def _between(points: Sequence[PlaceRule], layer: int, layers: int) -> PlaceRule:
    """What control points state for one layer: linear between the two that are nearest in depth."""
    for low, high in itertools.pairwise(points):
        if low.place.at <= layer <= high.place.at:
            share = (layer - low.place.at) / max(1, high.place.at - low.place.at)
            mixed = {key: _mix(low.parameters[key], high.parameters[key], share) for key in low.parameters}
            return PlaceRule(low.place, low.method, low.models, mixed)
    return points[-1]


def _mix(low: Any, high: Any, share: float) -> Any:
    if isinstance(low, dict):
        return {key: _mix(low[key], high[key], share) for key in low}
    mixed = low + (high - low) * share if 0 < share < 1 else (low, high)[round(share)]
    return round(mixed) if isinstance(low, int) else mixed


def _joined(models: Sequence[str]) -> str:
    return "+".join(models)
