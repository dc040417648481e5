"""A mergekit file, checked and taken apart: slices, sources, parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.errors import UserError, unknown
from mergesearch.mergekit import known, settings
from mergesearch.mergekit.settings import Setting
from mergesearch.methods import Method

log: logging.Logger = logging.getLogger(__name__)

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class SliceSource:
    """An input of a slice: its reference, its first layer and the one behind its last, and parameters by our names."""

    reference: str
    layers: tuple[int, int] | None
    parameters: Settings
    where: str


@dataclass(frozen=True)
class Slice:
    """Layers of the result: `first` is the number of the first of them, `count` is None where it is the whole model."""

    sources: tuple[SliceSource, ...]
    parameters: Settings
    first: int
    count: int | None
    where: str

    def depth(self, place: int) -> float:
        """The t of a gradient at a layer of the result."""
        return (place - self.first) / (self.count - 1) if self.count and self.count > 1 else 0.0


@dataclass(frozen=True)
class File:
    """A mergekit file, checked and taken apart."""

    method: Method
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    where: str

    def settings(self) -> Iterator[Setting]:
        """Every parameter at every level, in the order of the file."""
        for part in self.slices:
            for source in part.sources:
                yield from source.parameters.values()
            yield from part.parameters.values()
        yield from self.parameters.values()


def parse(top: Mapping[str, Any], where: str) -> File:
    """The file that data of known keys state; `UserError` for the first thing that is wrong or not supported."""
    method = known.method(_needed(top, "merge_method", where), where)
    return File(
        method=method,
        base=_base(top, where),
        slices=tuple(_slices(top, method, where)),
        parameters=_settings(top.get("parameters"), method, "shared", f"{where}, parameters"),
        where=where,
    )


def _needed(data: Mapping[str, Any], key: str, where: str) -> Any:
    if data.get(key) is None:
        raise UserError(f"{where}: {key} is missing: give it a value")
    return data[key]


def _base(top: Mapping[str, Any], where: str) -> str | None:
    given = [top.get("base_model"), *(part.get("base_model") for part in _list(top, "slices", where))]
    bases = dict.fromkeys(str(base) for base in given if base is not None)
    if len(bases) > 1:
        raise UserError(f"{where}: different base_model of slices, {', '.join(bases)}, are not supported: name one")
    return next(iter(bases), None)


def _list(data: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    value = data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: {key} is {value!r}: give a list of mappings")
    return value


def _slices(top: Mapping[str, Any], method: Method, where: str) -> Iterator[Slice]:
    models, slices = _list(top, "models", where), _list(top, "slices", where)
    if bool(models) == bool(slices):
        raise UserError(f"{where}: give one of models and slices")
    if models:
        yield _whole(models, method, where)
    first = 0
    for position, data in enumerate(slices):
        part = _slice(data, method, first, f"{where}, slices.{position}")
        first += part.count or 0
        yield part


def _whole(models: Sequence[Any], method: Method, where: str) -> Slice:
    sources = [_source(m, known.MODEL, method, f"{where}, models.{i}") for i, m in enumerate(models)]
    _check_distinct(sources, where)
    return Slice(tuple(sources), {}, 0, None, where)


def _slice(data: Any, method: Method, first: int, where: str) -> Slice:
    part = known.check_keys(data, known.SLICE, where)
    listed = _list(part, "sources", where)
    sources = [_source(s, known.SOURCE, method, f"{where}.sources.{i}") for i, s in enumerate(listed)]
    counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(counts) != 1:
        ranges = [list(source.layers or ()) for source in sources]
        raise UserError(f"{where}: layer_range of the sources are {ranges}: give each the same number of layers")
    _check_distinct(sources, where)
    return Slice(tuple(sources), _settings(part.get("parameters"), method, "shared", where), first, counts.pop(), where)


def _source(data: Any, keys: tuple[str, ...], method: Method, where: str) -> SliceSource:
    entry = known.check_keys(data, keys, where)
    layers = _layer_range(_needed(entry, "layer_range", where), where) if "layer_range" in keys else None
    reference = str(_needed(entry, "model", where))
    return SliceSource(reference, layers, _settings(entry.get("parameters"), method, "source", where), where)


def _layer_range(value: Any, where: str) -> tuple[int, int]:
    numbers = value if isinstance(value, list) and all(type(v) is int for v in value) else []
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
        raise UserError(f"{where}: layer_range is {value!r}: give the first layer and the one behind the last")
    return numbers[0], numbers[1]


def _check_distinct(sources: Sequence[SliceSource], where: str) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.reference in seen:
            raise UserError(f"{source.where}: {source.reference} is named twice there: give each model once")
        seen.add(source.reference)


def _settings(data: Any, method: Method, level: str, where: str) -> dict[str, Setting]:
    """The parameters of one level by our names; what mergekit reads at no such level is refused."""
    parsed = {}
    for key, value in (data if isinstance(data, Mapping) else known.check_keys(data or {}, (), where)).items():
        place = f"{where}.{key}"
        if known.has_no_effect(method, key):
            log.warning("%s: %s changes no tensor of %s and is ignored", where, key, method.name)
            continue
        keys = known.keys_of(method)
        if key not in keys:
            raise unknown(f"parameter of {method.name}", str(key), keys, where)
        if level == "source" and not known.from_source(method, keys[key]):
            raise UserError(f"{key} in {where} is one value for all models of {method.name}: give it under parameters")
        if key in known.OURS_ALONE.get(method.name, ()):
            log.warning("%s: mergekit's %s ignores %s; here it takes effect", where, method.name, key)
        parsed[keys[key]] = settings.parse(value, method.parameters[keys[key]], place)
    return parsed
