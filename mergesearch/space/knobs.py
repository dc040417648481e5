"""Knobs: the numbers of the methods that a study may turn, and the models that a method may be given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mergesearch.config import SpaceConfig
from mergesearch.errors import UserError, unknown
from mergesearch.methods import Method, Parameter

Bounds = Mapping[str, tuple[float, float]]


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


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

    def within(self, ranges: Bounds) -> Knob:
        """The same with the range that `ranges` has for it, if any."""
        bounds = ranges.get(self.parameter.key)
        return replace(self, low=bounds[0], high=bounds[1]) if bounds else self


def knobs_of(space: SpaceConfig, chosen: Mapping[str, Method]) -> dict[str, list[Knob]]:
    """The knobs of each method.

    Raises:
        UserError: a key that is no parameter of the methods, a range outside what a method allows.
    """
    known = {key: parameter for method in chosen.values() for key, parameter in method.parameters.items()}
    _check(space.ranges(), known, "space")
    for position, narrow in enumerate(space.ranges_for):
        _check(narrow.ranges(), known, f"space.ranges_for.{position}")
    return {name: _method_knobs(method, space.ranges()) for name, method in chosen.items()}


def _check(ranges: Bounds, known: Mapping[str, Parameter], where: str) -> None:
    for key, (low, high) in ranges.items():
        if key in ("weight", "density", "lambda") and key not in known:
            continue
        if key not in known or known[key].kind in ("bool", "choice"):
            numeric = [name for name, parameter in known.items() if parameter.kind in ("float", "int")]
            fields = [field.alias or name for name, field in SpaceConfig.model_fields.items()]
            raise unknown("key", key, {*numeric, *fields}, where)
        if math.isnan(low) or math.isnan(high) or low > high:
            raise UserError(f"{where}.{key}: give a range [low, high] or one number")
        known[key].check(low, where)
        known[key].check(high, where)


def _method_knobs(method: Method, ranges: Bounds) -> list[Knob]:
    knobs = []
    for key, parameter in method.parameters.items():
        bounds = ranges.get(key, parameter.search if parameter.kind in ("float", "int") else None)
        if bounds is not None:
            knobs.append(Knob(parameter, *bounds))
    return knobs


def subsets_of(method: Method, models: Sequence[str]) -> list[tuple[str, ...]]:
    """Which models a method may be given: all of them, or each choice of as many as it takes.

    Raises:
        UserError: the run has fewer models than it needs.
    """
    if len(models) < method.min_models:
        raise UserError(
            f"space.methods: {method.name} merges at least {method.min_models} models, the run has {len(models)}: "
            "add models or leave the method out"
        )
    if method.max_models is None or len(models) <= method.max_models:
        return [tuple(models)]
    return list(itertools.combinations(models, method.max_models))
