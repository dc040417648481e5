"""A mergekit file becomes a `Recipe`.

Arithmetic is float32 here whatever `dtype` says (mergekit computes in `dtype`), and the result is rounded once, to
`out_dtype`, else `dtype`, else the models' own. DARE and DELLA get mergekit's rule, `rescale: l1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergesearch import recipe as recipes
from mergesearch.errors import UserError
from mergesearch.mergekit import known, models, settings
from mergesearch.mergekit.file import File, Settings, Slice, SliceSource, parse
from mergesearch.mergekit.grouping import Merge, rules
from mergesearch.mergekit.settings import Condition
from mergesearch.methods import Method
from mergesearch.recipe import BASE, DTYPES, UNION, Recipe
from mergesearch.schema import read_yaml


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a file's data are mergekit's: a native recipe has `rules`."""
    marks = ("merge_method", "slices", "modules", "base_model")
    return "rules" not in data and (any(key in data for key in marks) or isinstance(data.get("models"), list))


def read_any(path: str | Path) -> Recipe:
    """The recipe in a YAML file, native or mergekit's.

    Raises:
        UserError: what is wrong with the file, in one sentence.
    """
    _refuse_many(path)
    data = read_yaml(path)
    return from_data(data, str(path)) if is_mergekit(data) else recipes.read(path)


def read(path: str | Path) -> Recipe:
    """The recipe that a mergekit file states.

    Raises:
        UserError: what is wrong with the file, or what in it is not supported, by name.
    """
    _refuse_many(path)
    return from_data(read_yaml(path), str(path))


def from_data(data: Any, where: str) -> Recipe:
    """The recipe that a mergekit file's data state; `UserError` as `read`."""
    top = known.check_keys(data, known.TOP, where)
    return _recipe(models.complete(parse(top, where)), top)


def _refuse_many(path: str | Path) -> None:
    """Several documents in one file are mergekit-multi's; whatever else is wrong with a file is found later."""
    try:
        events = list(yaml.parse(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    count = sum(isinstance(event, yaml.DocumentStartEvent) for event in events)
    if count > 1:
        raise UserError(
            f"{path} holds {count} documents, which belongs to mergekit-multi and is not supported: "
            "merge each of them by a file of its own"
        )


def _recipe(file: File, top: Mapping[str, Any]) -> Recipe:
    names = models.names(file)
    stack, layers = models.stack(file, names)
    filters = list(dict.fromkeys(settings.filters(file.settings())))
    models.check_filters(filters, stack, file.where)
    _check_required(file)
    everyone = tuple(names.values())

    def lookup(place: int, matched: frozenset[str]) -> Merge | None:
        return _merge_at(file, names, everyone, place, matched)

    return Recipe.from_data(
        {
            "base": file.base,
            "models": {name: reference for reference, name in names.items()},
            "rules": [
                rule.model_dump()
                for rule in rules(file.method.name, filters, layers, lookup, lambda: models.tensor_names(file))
            ],
            "out_dtype": _out_dtype(top, file),
            "tokenizer": _tokenizer(top, file, names),
            "stack": stack,
        },
        file.where,
    )


def _merge_at(
    file: File, names: Mapping[str, str], everyone: tuple[str, ...], place: int, matched: frozenset[str]
) -> Merge | None:
    """What merges the tensors at a place whose names contain just the filters `matched`; None if a value is missing."""
    part = _part_at(file, place)
    depth = part.depth(place) if part.count and place < part.first + part.count else 0.0
    sources = models.inputs(file, part)
    parameters: dict[str, Any] = {}
    for key in file.method.parameters:
        given = _value(file, part, sources, key, depth, matched)
        if given is _MISSING:
            return None
        if given is not None:
            parameters[key] = given
    taking_part = tuple(names[source.reference] for source in sources)
    return Merge(None if taking_part == everyone else taking_part, parameters)


def _part_at(file: File, place: int) -> Slice:
    """The slice of a place, which for the tensors behind the layers is the last."""
    inside = (s for s in file.slices if s.count is None or place < s.first + s.count)
    return next(inside, None) or models.behind(file)


_MISSING = object()


def _value(
    file: File, part: Slice, sources: Sequence[SliceSource], key: str, depth: float, matched: frozenset[str]
) -> Any:
    """Our parameter at one place: None for the default, `_MISSING` where mergekit would refuse."""
    parameter = file.method.parameters[key]
    levels = [part.parameters, file.parameters]
    if not known.from_source(file.method, key):
        condition = _first(levels, key, matched)
        if condition is None:
            return _default(file.method, key)
        return settings.at(condition.value, depth)
    given = [_first([source.parameters, *levels], key, matched) for source in sources]
    if all(condition is None for condition in given):
        return _default(file.method, key)
    if known.is_required(file.method, key) and None in given:
        return _MISSING
    values = [parameter.default if c is None else settings.at(c.value, depth) for c in given]
    return values if parameter.per_model else values[0]


def _default(method: Method, key: str) -> Any:
    if known.is_required(method, key):
        return _MISSING
    return "l1" if key == "rescale" and method.name in known.RANDOM_RESCALE else None


def _first(levels: Sequence[Settings], key: str, matched: frozenset[str]) -> Condition | None:
    holding = (level[key].find(matched) for level in levels if key in level)
    return next((condition for condition in holding if condition is not None), None)


def _check_required(file: File) -> None:
    """`UserError` where no level says anything of a parameter that mergekit wants for every model."""
    for key in (k for k in file.method.parameters if known.is_required(file.method, k)):
        for part in file.slices:
            levels = [part.parameters, file.parameters]
            inputs = models.inputs(file, part) if known.from_source(file.method, key) else [None]
            for source in inputs:
                if not any(key in level for level in ([source.parameters] if source else []) + levels):
                    whose = f" of {source.reference}" if source else ""
                    raise UserError(
                        f"{part.where}: {key}{whose} is missing: {file.method.name} needs it in mergekit's files"
                    )


def _out_dtype(top: Mapping[str, Any], file: File) -> str:
    for key in ("dtype", "out_dtype"):
        value = top.get(key)
        if value is not None and value not in DTYPES:
            raise UserError(f"{file.where}: {key} {value!r} is not supported: use {', '.join(DTYPES)}")
    return top.get("out_dtype") or top.get("dtype") or models.common_dtype(file)


def _tokenizer(top: Mapping[str, Any], file: File, names: Mapping[str, str]) -> str:
    nested = known.check_keys(top.get("tokenizer") or {}, known.TOKENIZER, f"{file.where}, tokenizer").get("source")
    if nested is not None and top.get("tokenizer_source") is not None:
        raise UserError(f"{file.where}: tokenizer and tokenizer_source are both given: keep one of them")
    source = str(nested or top.get("tokenizer_source") or BASE)
    reference = source.removeprefix("model:")
    if source in (BASE, UNION) or reference == file.base:
        return source if source == UNION else BASE
    if reference not in names:
        raise UserError(
            f"{file.where}: the tokenizer's source {source} is not supported: use base, union or a model of the merge"
        )
    return names[reference]
