"""From parameters that depend on layers and name filters to the shortest list of rules, the first that covers wins."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergesearch.errors import UserError
from mergesearch.recipe import Rule

MAX_FILTERS = 10
# in the names of tensors inside decoder layers a layer's number stands after a dot
_INSIDE = "*.[0-9]"
_NEVER_OUTSIDE = ("attn", "attention", "mlp", "_proj", "experts", "input_layernorm", "post_attention")


@dataclass(frozen=True)
class Merge:
    """What merges the tensors of one class at one place: the models that take part and our parameters."""

    models: tuple[str, ...] | None
    parameters: Mapping[str, Any]


# the place (0 for the first layer; the last place stands for the final norm and the head), the filters that match
Lookup = Callable[[int, frozenset[str]], "Merge | None"]


def rules(
    method: str, filters: Sequence[str], layers: int | None, lookup: Lookup, names: Callable[[], Collection[str]]
) -> tuple[Rule, ...]:
    """Rules that give each tensor what `lookup` says of its place and of the filters that its name matches.

    A tensor outside the layers belongs to place 0 if it stands before them, an embedding, and to place `layers` if it
    stands behind them. `layers` None: nothing depends on the place. Where `lookup` gives None no rule is made. `names`
    is called for the tensors' names only where several filters might match one.

    Raises:
        UserError: more filters than can be told apart.
    """
    if len(filters) > MAX_FILTERS:
        raise UserError(f"{len(filters)} different filters are not supported: use {MAX_FILTERS} at most")
    places = 1 if layers is None else layers + 1

    def column(matched: frozenset[str]) -> tuple[Merge | None, ...]:
        return tuple(lookup(place, matched) for place in range(places))

    entries, there = _entries(filters, column, None), None
    if any(len(matched) > 1 for matched, _ in entries):
        there = names()
        entries = _entries(filters, column, {frozenset(f for f in filters if f in name) for name in there})
    result = []
    for matched, values in entries:
        patterns = [p for p in globs(matched) if p is None or there is None or any(fnmatchcase(n, p) for n in there)]
        result += _rules_of(method, matched, patterns, values)
    return tuple(rule for rule in result if rule is not None)


def _entries(
    filters: Sequence[str], column: Callable[[frozenset[str]], tuple[Any, ...]], possible: Collection[Any] | None
) -> list[tuple[Any, Any]]:
    """The least of (filters, column) such that the first one whose filters all match is right for every tensor.

    More filters come first, and among equally many those named first in the file. `possible`: the sets of filters that
    some tensor matches, None if that is not known.
    """
    kept: list[tuple[frozenset[str], tuple[Any, ...]]] = []
    for size in range(len(filters) + 1):
        level = []
        for chosen in itertools.combinations(filters, size):
            matched = frozenset(chosen)
            if any(f in g and f not in matched for g in matched for f in filters):
                continue
            if matched and possible is not None and matched not in possible:
                continue
            wanted = column(matched)
            given = next((c for s, c in [*level, *kept] if s <= matched), None)
            if wanted != given and any(merge is not None for merge in wanted):
                level.append((matched, wanted))
        kept = [*level, *kept]
    return kept


def _rules_of(
    method: str, matched: frozenset[str], patterns: Sequence[str | None], column: Sequence[Merge | None]
) -> Iterator[Rule | None]:
    inside_only = any(word in f for f in matched for word in _NEVER_OUTSIDE) or any(
        re.search(r"(^|\.)\d", f) for f in matched
    )
    *inner, outer = column if len(column) > 1 else (*column, column[0])
    if all(merge == inner[0] for merge in inner) and (inside_only or outer == inner[0]):
        yield from (_rule(method, inner[0], None, pattern) for pattern in patterns)
        return
    for first, last in _runs(inner):
        ends = last == len(inner) - 1 and not inside_only and outer != inner[-1]
        for pattern in patterns:
            yield _rule(method, inner[first], (first, last), _INSIDE + (pattern or "*") if ends else pattern)
    if not inside_only and outer != inner[-1]:
        end = len(inner) - 1
        yield from (_rule(method, outer, (end, end), pattern) for pattern in patterns)


def _rule(method: str, merge: Merge | None, layers: tuple[int, int] | None, pattern: str | None) -> Rule | None:
    if merge is None:
        return None
    return Rule(layers=layers, tensors=pattern, method=method, models=merge.models, parameters=dict(merge.parameters))


def _runs(values: Sequence[Any]) -> Iterator[tuple[int, int]]:
    start = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at] != values[start]:
            yield start, at - 1
            start = at


def globs(matched: frozenset[str]) -> Iterator[str | None]:
    """Patterns of which a name with all of `matched` in it fits one or more; None where there is nothing to match."""
    needed = sorted(f for f in matched if not any(f != g and f in g for g in matched))
    if not needed:
        yield None
        return
    patterns = dict.fromkeys(
        f"*{joined}*" for order in itertools.permutations(needed) for joined in _joined([_escaped(f) for f in order])
    )
    yield from patterns


def _joined(parts: Sequence[Sequence[str]]) -> Iterator[str]:
    """All ways to write `parts` one behind another: apart, or with the end of one as the beginning of the next."""
    if len(parts) == 1:
        yield "".join(parts[0])
        return
    first, second, *rest = parts
    yield from ("".join(first) + "*" + tail for tail in _joined([second, *rest]))
    for size in range(1, min(len(first), len(second))):
        if first[-size:] == second[:size]:
            yield from _joined([[*first, *second[size:]], *rest])


def _escaped(text: str) -> list[str]:
    return [f"[{c}]" if c in "*?[" else c for c in text]
