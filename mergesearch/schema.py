"""Strict YAML models: what both recipes and run configurations share.

An unknown key is refused with the nearest valid one, a value out of range with the range, in one sentence.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic.fields import FieldInfo

from mergesearch.errors import UserError, unknown, without_passwords

Model = TypeVar("Model", bound="Strict")


def _as_list(value: Any) -> Any:
    """A single name is a list of it alone."""
    return [value] if isinstance(value, str) else value


# of a list of names, for which one name may stand alone
ONE_OR_MORE = pydantic.BeforeValidator(_as_list)
_OR_NONE = " or none"
_OUTSIDE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Strict(pydantic.BaseModel):
    """A frozen pydantic model that knows no other keys than its fields."""

    model_config: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @classmethod
    def further(cls) -> type[Strict] | None:
        """A model of the keys that it takes beside its fields, where they are known."""
        return None


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
    return UserError(f"{where}: {place} is {without_passwords(repr(problem['input']))}: {lowered}")


def _inside(where: str, location: tuple[Any, ...]) -> str:
    return f"{where}, {'.'.join(str(part) for part in location)}" if location else where


def _keys_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a place inside `model`."""
    for part in location:
        if not isinstance(part, int) and part in fields_of(model):
            model = inner_model(fields_of(model)[part].annotation) or model
    return list(fields_of(model))


def _field_at(model: type[Strict], location: tuple[Any, ...]) -> FieldInfo:
    """The field that a place inside `model` belongs to."""
    *parents, last = [part for part in location if isinstance(part, str)]
    for part in parents:
        model = inner_model(fields_of(model)[part].annotation) or model
    return fields_of(model)[last]


def fields_of(model: type[Strict]) -> dict[str, FieldInfo]:
    """The keys of a model as a file names them, with those that it takes beside its fields."""
    further = model.further()
    own = {field.alias or name: field for name, field in model.model_fields.items()}
    return own if further is None else {**own, **fields_of(further)}


def words_of_type(field: FieldInfo) -> str:
    """What a field takes, in words: `a number in (0, 1)`, `one of free, softmax`, `a list of text`."""
    words = _words_of(field.annotation)
    if not any(_is_bound(metadata) for metadata in field.metadata):
        return words
    plain = words.removesuffix(_OR_NONE)
    return f"{plain} in {_allowed_range(field)}{_OR_NONE if plain != words else ''}"


def _words_of(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _words_of(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_words_of(arguments[0])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list of {_words_of(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_words_of, arguments))}]"
    if origin is dict:
        return f"a mapping of {' to '.join(map(_words_of, arguments))}"
    if _is_model(annotation):
        return "keys of its own"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words_of(argument) for argument in arguments)
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "none",
        Any: "any value",
    }
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


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


def inner_model(annotation: Any) -> type[Strict] | None:
    """The model that a field holds, alone, in a list or as one of several types; None where there is none."""
    if _is_model(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = inner_model(argument)
        if inner is not None:
            return inner
    return None
