"""Filters for a mergekit file: parts of names that tell tensors with one value from tensors with another."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mergesearch.errors import UserError

_NUMBER = re.compile(r"(?:^|.*?\.)\d+\.")


def conditions(values: Mapping[str, Any], key: str) -> Any:
    """A parameter as mergekit writes it: one value, or a list of `filter` and `value` whose last has no filter.

    Args:
        values: what each name gets; names that may get anything are left out.
        key: the parameter, for the error.

    Raises:
        UserError: no part of the names tells them apart.
    """
    distinct = [value for value, _ in Counter(map(_hashable, values.values())).most_common()]
    groups = {value: [name for name, v in values.items() if _hashable(v) == value] for value in distinct}
    fallback, *others = distinct
    written = []
    for position, value in reversed(list(enumerate(others))):
        rest = [name for other in [fallback, *others[:position]] for name in groups[other]]
        parts = _cover(groups[value], rest, key)
        written += [{"filter": part, "value": _original(values, value)} for part in parts]
    last = _original(values, fallback)
    return [*written, {"value": last}] if written else last


def _hashable(value: Any) -> Any:
    return (type(value).__name__, value)


def _original(values: Mapping[str, Any], hashed: Any) -> Any:
    return next(value for value in values.values() if _hashable(value) == hashed)


def _cover(wanted: Sequence[str], others: Collection[str], key: str) -> list[str]:
    """Few parts of names such that every wanted name holds one of them and no other name does."""
    candidates = {part for name in wanted for part in _parts(name)}
    allowed = {part: {n for n in wanted if part in n} for part in candidates if not any(part in n for n in others)}
    missing, chosen = set(wanted), []
    while missing:
        best = min(allowed, key=lambda part: (-len(allowed[part] & missing), _plainness(part)), default=None)
        if best is None or not allowed[best] & missing:
            raise UserError(
                f"{key} of {min(missing)} cannot be written for mergekit: filters there are parts of names, and each "
                "of this one is in a name that gets another value; export the checkpoint itself"
            )
        chosen.append(best)
        missing -= allowed[best]
    return sorted(chosen)


def _parts(name: str) -> Iterator[str]:
    """What a filter for this name may be: runs of the words behind the layer's number, pieces of words, the whole."""
    inside = _NUMBER.match(name)
    words = name[inside.end() :].split(".") if inside else name.split(".")
    for start, end in itertools.combinations(range(len(words) + 1), 2):
        yield ".".join(words[start:end])
    for word in words:
        yield from word.split("_")
    if "norm" in name:
        yield "norm"


def _plainness(part: str) -> tuple[Any, ...]:
    whole = part in ("self_attn", "mlp", "attn", "norm", "embed_tokens", "lm_head")
    return (not whole, part in ("weight", "bias", "self"), part.count("."), len(part), part)
