"""A configuration's YAML file: overrides, and what its paths are relative to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mergesearch import registry
from mergesearch.config.models import Config
from mergesearch.errors import UserError
from mergesearch.paths import absolute, absolute_path, absolute_reference
from mergesearch.schema import parse_yaml, read_yaml, validate


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key=value` overrides (`search.trials=10`, `tasks.0.limit=50`).

    Paths come out absolute. In the file, `base_model`, `models`, `include_path` and what strategies take as paths are
    relative to the file. Overrides, and `output` and `storage` wherever they stand, are relative to the caller's
    folder.

    Raises:
        UserError: what is wrong with the file or an override, in one sentence.
    """
    return from_data(read_yaml(path), Path(path), overrides)


def from_data(data: dict[str, Any], file: Path, overrides: Sequence[str] = ()) -> Config:
    """The same from the data of a file.

    Args:
        data: changed in place.
        file: what paths in them are relative to the folder of, and what messages name.
        overrides: as for `read`.

    Raises:
        UserError: what is wrong with them, in one sentence.
    """
    keys = [_override(data, override) for override in overrides]
    _make_absolute(data, file, keys)
    return validate(Config, data, str(file))


def _make_absolute(data: dict[str, Any], file: Path, overridden: Sequence[tuple[str, ...]]) -> None:
    """Makes the paths in a configuration's data absolute: those of the file from its folder, those of overrides from
    the caller's.

    Args:
        data: changed in place.
        file: where the data were read.
        overridden: the keys that overrides have set, each taken apart.
    """
    for place, key, location, make in _paths_in(data):
        typed = any(location[: len(keys)] == keys for keys in overridden)
        where = f"--set {'.'.join(location)}" if typed else f"{file}: {'.'.join(location)}"
        place[key] = make(place[key], Path.cwd() if typed else file.parent, where)
    if isinstance(storage := data.get("storage"), str):
        data["storage"] = _absolute_storage(storage)


def _paths_in(data: dict[str, Any]) -> Iterator[tuple[Any, Any, tuple[str, ...], Callable[[str, Path, str], str]]]:
    """Where paths stand in a configuration's data: what holds one, its key there, the whole key taken apart, and what
    makes it absolute. What is no text is left to the validation."""
    if isinstance(data.get("base_model"), str):
        yield data, "base_model", ("base_model",), absolute_reference
    models = data.get("models")
    for name, reference in models.items() if isinstance(models, dict) else ():
        if isinstance(reference, str):
            yield models, name, ("models", str(name)), absolute_reference
    search = [key for strategy in registry.strategies().values() for key in strategy.paths]
    holders = [(data, ("include_path",)), *((data.get("search"), ("search", key)) for key in search)]
    for holder, location in holders:
        paths = holder.get(location[-1]) if isinstance(holder, dict) else None
        if isinstance(paths, str):
            yield holder, location[-1], location, absolute_path
        for position, path in enumerate(paths if isinstance(paths, list) else ()):
            if isinstance(path, str):
                yield paths, position, (*location, str(position)), absolute_path


def _absolute_storage(url: str) -> str:
    """The URL of a SQLite file with its path from the caller's folder made absolute; any other URL as it is."""
    scheme, separator, path = url.partition(":///")
    if (
        not separator
        or scheme.partition("+")[0] != "sqlite"
        or not path
        or path.startswith((":memory:", "file:", "?", "${"))
    ):
        return url
    return f"{scheme}:///{absolute(path, Path.cwd())}"


def _override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets what an override says, and returns the key that it sets, taken apart."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write it as key=value, for example --set search.trials=10")
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        place = _step(place, part, key)
    if isinstance(place, list):
        place[_position(place, last, key)] = parse_yaml(text, f"--set {key}")
    elif isinstance(place, dict):
        place[last] = parse_yaml(text, f"--set {key}")
    else:
        raise UserError(f"--set {key}: {'.'.join(parents)} holds {place!r}, which has no keys")
    return (*parents, last)


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise UserError(f"--set {key}: there is nothing below {place!r}")


def _position(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"--set {key}: {part!r} is no position in a list of {len(place)}: count from 0")
    return int(part)
