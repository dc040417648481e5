"""Strict YAML models: what both recipes and run configurations share.

An unknown key is refused with the nearest valid one, a value out of range with the range, in one sentence.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
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

    @pydantic.model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, data: Any) -> Any:
        """Python counts true as 1, and nobody means that."""
        for name, field in cls.model_fields.items() if isinstance(data, Mapping) else ():
            key = name if name in data else field.alias
            if isinstance(data.get(key), bool) and _is_number(field.annotation):
                raise ValueError(f"{key} is {str(data[key]).lower()}: give {_words_of(field.annotation)}")
        return data

    @classmethod
    def further(cls) -> type[Strict] | None:
        """A model of the keys that it takes beside its fields, where they are known."""
        return None


# levels within levels, and values counted as often as aliases repeat them, beyond which no file of ours means anything
_DEPTH, _VALUES = 64, 1_000_000
_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, where: str) -> Any:
    """The value a YAML text states.

    Raises:
        UserError: the text is no YAML, gives a key twice, has a key that is no single word, goes too many levels deep,
            repeats itself without end, or holds a character that no text and no path can have.
    """
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_odd(root, loader, where)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise UserError(f"{where}{place} is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(_too_deep(where)) from None
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise UserError(f"{where} holds a value that is none ({error}): put quotes around it if it is text") from None


def _too_deep(where: str) -> str:
    return f"{where} goes more than {_DEPTH} levels deep: nothing that belongs here does, so write it anew"


def _refuse_odd(root: yaml.Node, loader: yaml.SafeLoader, where: str) -> None:
    """`UserError` for what YAML allows and no file of ours means; an alias counts as what it stands for."""
    waiting, values = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if depth > _DEPTH:
            raise UserError(_too_deep(where))
        if values > _VALUES:
            raise UserError(
                f"{where} states more than {_VALUES:,} values, by aliases of aliases: write out what is meant"
            )
        if isinstance(node, yaml.MappingNode):
            _refuse_keys(node, loader, where)
            waiting.extend((part, depth + 1) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((part, depth + 1) for part in node.value)
        elif any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
            line = node.start_mark.line + 1
            raise UserError(f"{where}, line {line}: {node.value!r} holds what is no character of a text: take it out")


def _refuse_keys(node: yaml.MappingNode, loader: yaml.SafeLoader, where: str) -> None:
    seen = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            kind = "list" if isinstance(key_node, yaml.SequenceNode) else "mapping"
            raise UserError(f"{where}: the key in line {line} is a {kind}: a key is one word; put quotes around text")
        if key_node.tag == _MERGE:  # `<<` takes over what an alias has
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise UserError(f"{where}: key {key!r} is given twice, again in line {line}: keep one of them")
        seen.add(key)


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file of a run folder states.

    Args:
        remedy: what to do where it cannot be read.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON ({error}): {remedy}") from None


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
    except (OSError, ValueError) as error:
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
        raise _explain(model, _first(error.errors()), where) from None


def _first(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The problem that is told: for a key that is missing the one beside it that nobody knows, which it may be."""
    first = problems[0]
    if first["type"] != "missing":
        return first
    unknown = (p for p in problems if p["type"] == "extra_forbidden" and p["loc"][:-1] == first["loc"][:-1])
    return next(unknown, first)


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
    if problem["type"] == "dict_type":
        lowered = "it must be keys and values, as in {NAME: VALUE}"
    if problem["type"] == "model_type":  # a part of the file that has keys of its own
        keys = _keys_at(model, location)
        lowered = f"it must be keys and values, as in {{{keys[0]}: ...}} (known: {', '.join(keys)})"
    given = without_passwords(repr(problem["input"]))
    return UserError(f"{where}: {place} is {given if len(given) <= 200 else f'{given[:200]}...'}: {lowered}")


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


def _is_number(annotation: Any) -> bool:
    """Whether a field takes numbers, or numbers or nothing, and no truth values."""
    kinds = set(typing.get_args(annotation)) or {annotation}
    return bool(kinds & {int, float}) and kinds <= {int, float, type(None)}


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
