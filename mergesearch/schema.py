"""Strict YAML models: what both recipes and run configurations share.

An unknown key is refused with the nearest valid one, a value out of range with the range, in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo

from mergesearch.errors import UserError, unknown

Model = TypeVar("Model", bound="Strict")

_OUTSIDE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Strict(pydantic.BaseModel):
    """A frozen pydantic model that knows no other keys than its fields."""

    model_config: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"key {key!r} is given twice, again in line {line}: keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value a YAML text states.

    Raises:
        UserError: the text is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{where}{place} is not valid YAML: {problem}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file states.

    Raises:
        UserError: no such file, not readable, no YAML, or no mapping of keys to values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not a mapping of keys to values")
    return data


def validate(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """`data` as a `model`.

    Raises:
        UserError: the first problem, with its place, the value, and what would be valid.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(model, error.errors()[0], where) from None


def _explain(model: type[Strict], problem: Mapping[str, Any], where: str) -> UserError:
    location = problem["loc"]
    place = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return unknown("key", str(location[-1]), _keys_at(model, location[:-1]), _inside(where, location[:-1]))
    if problem["type"] == "missing":
        return UserError(f"{where}: {place} is missing: give it a value")
    message = problem["msg"].removeprefix("Value error, ")
    lowered = message[:1].lower() + message[1:]
    if problem["type"] == "value_error":
        return UserError(f"{where}: {place}: {lowered}" if place else f"{where}: {lowered}")
    if problem["type"] in _OUTSIDE:
        lowered = f"it must be in {_allowed_range(_field_at(model, location))}"
    return UserError(f"{where}: {place} is {problem['input']!r}: {lowered}")


def _inside(where: str, location: tuple[Any, ...]) -> str:
    return f"{where}, {'.'.join(str(part) for part in location)}" if location else where


def _keys_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a place inside `model`."""
    for part in location:
        if not isinstance(part, int) and part in _fields(model):
            model = _inner_model(_fields(model)[part].annotation) or model
    return list(_fields(model))


def _field_at(model: type[Strict], location: tuple[Any, ...]) -> FieldInfo:
    """The field that a place inside `model` belongs to."""
    *parents, last = [part for part in location if isinstance(part, str)]
    for part in parents:
        model = _inner_model(_fields(model)[part].annotation) or model
    return _fields(model)[last]


def _fields(model: type[Strict]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _allowed_range(field: FieldInfo) -> str:
    """The bounds of a number, `[0, 1)`."""
    bounds = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in field.metadata if _is_bound(m)}
    left = f"({bounds['Gt']}" if "Gt" in bounds else f"[{bounds['Ge']}" if "Ge" in bounds else "(-inf"
    right = f"{bounds['Lt']})" if "Lt" in bounds else f"{bounds['Le']}]" if "Le" in bounds else "inf)"
    return f"{left}, {right}"


def _is_bound(metadata: Any) -> bool:
    return type(metadata).__name__ in ("Gt", "Ge", "Lt", "Le")


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _inner_model(annotation: Any) -> type[Strict] | None:
    if _is_model(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
