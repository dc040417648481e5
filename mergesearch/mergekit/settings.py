"""A mergekit parameter: a value or a gradient over layers, for all tensors or for those whose name a filter matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergesearch.errors import UserError
from mergesearch.mergekit.known import check_keys
from mergesearch.methods import Parameter


@dataclass(frozen=True)
class Condition:
    """A value of ours, or a gradient (a tuple of numbers), for names that contain `filter`; None matches every name."""

    filter: str | None
    value: Any


@dataclass(frozen=True)
class Setting:
    """All that one level of a file says about one parameter."""

    conditions: tuple[Condition, ...]

    def find(self, matched: frozenset[str]) -> Condition | None:
        """The first condition that holds for a name which contains just these of the file's filters."""
        return next((c for c in self.conditions if c.filter is None or c.filter in matched), None)


def parse(value: Any, parameter: Parameter, where: str) -> Setting:
    """A parameter's value as a file states it.

    Raises:
        UserError: it is none of a value, a gradient, and a list of `filter` and `value`, or a value is not allowed.
    """
    if isinstance(value, Mapping):
        return Setting((_condition(value, parameter, where),))
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        return Setting(tuple(_condition(v, parameter, f"{where}.{i}") for i, v in enumerate(value)))
    return Setting((Condition(None, _values(value, parameter, where)),))


def _condition(data: Any, parameter: Parameter, where: str) -> Condition:
    known = check_keys(data, ("filter", "value"), where)
    if "value" not in known:
        raise UserError(f"{where} has no value: give one beside filter")
    pattern = known.get("filter")
    if pattern is not None and (not isinstance(pattern, str) or not pattern):
        raise UserError(
            f"filter {pattern!r} in {where} is not allowed: give a part of the tensors' names, or leave it out"
        )
    return Condition(None if pattern == "*" else pattern, _values(known["value"], parameter, where))


def _values(value: Any, parameter: Parameter, where: str) -> Any:
    """A value, or a gradient as a tuple; one of a single value is that value."""
    if isinstance(value, Mapping) or value is None or value == []:
        raise UserError(f"{where} is {value!r}: give a value, a list over layers, or a list of filter and value")
    if not isinstance(value, list):
        return native(value, parameter, where)
    if len(value) > 1 and parameter.kind != "float":
        raise UserError(f"{parameter.key} {value} in {where} is a gradient, which only numbers can be: give one value")
    numbers = tuple(native(v, parameter, where) for v in value)
    return numbers[0] if len(numbers) == 1 else numbers


def filters(settings: Iterable[Setting]) -> Iterator[str]:
    """Every filter, in the order of the file."""
    return (c.filter for setting in settings for c in setting.conditions if c.filter is not None)


def has_gradient(settings: Iterable[Setting]) -> bool:
    return any(isinstance(c.value, tuple) for setting in settings for c in setting.conditions)


def at(value: Any, t: float) -> Any:
    """A condition's value at the relative depth t, from 0 for the first layer of a slice to 1 for its last.

    A gradient's values stand at equal distances; between two of them it is a straight line.
    """
    if not isinstance(value, tuple):
        return value
    place = t * (len(value) - 1)
    left = min(int(place), len(value) - 2)
    share = place - left
    return (1 - share) * value[left] + share * value[left + 1]


def native(value: Any, parameter: Parameter, where: str) -> Any:
    """mergekit's value as ours: truth may be written 0 and 1 there, and `rescale` is a choice here."""
    if parameter.key == "rescale":
        return "l1" if _truth(value, parameter, where) else "none"
    return _truth(value, parameter, where) if parameter.kind == "bool" else parameter.check(value, where)


def _truth(value: Any, parameter: Parameter, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise UserError(f"{parameter.key} {value!r} in {where} is not allowed: it must be true or false")
