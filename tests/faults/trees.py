"""Mutations of valid data: what a tree of mappings, lists and values may be turned into, and its text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
# values of every type, at and beyond the ends of every range; each with the words that name it
STRANGE: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "-1": -1,
    "1": 1,
    "2": 2,
    "10**9": 10**9,
    "10**30": 10**30,
    "2**63": 2**63,
    "0.5": 0.5,
    "-0.5": -0.5,
    "1e308": 1e308,
    "-1e300": -1e300,
    "1e-320": 1e-320,
    "inf": float("inf"),
    "nan": float("nan"),
    "''": "",
    "' '": " ",
    "'x'": "x",
    "'all'": "all",
    "'..'": "..",
    "'/'": "/",
    "'a/b'": "a/b",
    "'$(id)|`id`<b>'": "$(id)|`id`<b>",
    "NUL": "a\0b",
    "a line feed": "a\nb",
    "an emoji": "\U0001f600",
    "a lone surrogate": "\ud800",
    "a long text": "x" * 5000,
    "[]": [],
    "{}": {},
    "[1]": [1],
    "[null]": [None],
    "[[]]": [[]],
    "[0, 1]": [0, 1],
    "[1, 0]": [1, 0],
    "[-1e300, 1e300]": [-1e300, 1e300],
    "['x', 'x']": ["x", "x"],
    "{'x': 1}": {"x": 1},
    "{1: 2}": {1: 2},
    "1,000 of them": list(range(1000)),
    "100 levels of lists": json.loads("[" * 100 + "]" * 100),
}


@dataclass(frozen=True)
class Mutated:
    """Data or a text, and in words what was done to it."""

    value: Any
    words: str


def paths(tree: Any, at: Path = ()) -> Iterator[Path]:
    """Every place in a tree, its root last."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from paths(value, (*at, key))
    yield at


def name_of(path: Path) -> str:
    return ".".join(map(str, path)) or "everything"


def within(tree: Any, path: Path) -> Any:
    """What is at a place in a tree."""
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: Path, change: Callable[[Any, Any], None]) -> Any:
    """A copy of `tree` in which `change` was called with what holds the place, and its key there."""
    held = [copy.deepcopy(tree)]
    *above, last = (0, *path)
    change(within(held, tuple(above)), last)
    return held[0]


@st.composite
def mutations(draw: st.DrawFn, tree: Any, extra: tuple[Path, ...] = ()) -> Mutated:
    """One mutation of a tree.

    Args:
        extra: places that are not in it and may be given a value.
    """
    there = [path for path in paths(tree)]
    path = draw(st.sampled_from([*there, *extra]))
    word = draw(st.sampled_from(sorted(STRANGE)))

    def put(holder: Any, key: Any) -> None:
        holder[key] = copy.deepcopy(STRANGE[word])

    if path in extra and path not in there:
        grown = copy.deepcopy(tree)
        for position in range(1, len(path)):
            holder = within(grown, path[: position - 1])
            if not isinstance(holder.get(path[position - 1]) if isinstance(holder, dict) else None, dict):
                holder[path[position - 1]] = {}
        return Mutated(changed(grown, path, put), f"{name_of(path)} = {word}")
    what = draw(st.sampled_from(["put", "put", "put", "drop", "wrap", "twice", "rename", "as text"]))
    if not path and what in ("drop", "rename"):
        what = "put"
    if what == "put":
        return Mutated(changed(tree, path, put), f"{name_of(path)} = {word}")
    if what == "drop":
        return Mutated(changed(tree, path, lambda holder, key: holder.pop(key)), f"without {name_of(path)}")
    if what == "wrap":
        return Mutated(changed(tree, path, lambda h, k: h.__setitem__(k, [h[k]])), f"{name_of(path)} in a list")
    if what == "twice":
        return Mutated(changed(tree, path, lambda h, k: h.__setitem__(k, [h[k], h[k]])), f"{name_of(path)} twice")
    if what == "as text":
        return Mutated(changed(tree, path, lambda h, k: h.__setitem__(k, str(h[k]))), f"{name_of(path)} as text")

    def rename(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder.insert(key, holder[key])

    return Mutated(changed(tree, path, rename), f"{name_of(path)} renamed")


def texts(text: str) -> dict[str, bytes]:
    """What a file's text may be turned into, whatever is in it, by the words for it."""
    data = text.encode()
    lines = text.splitlines(keepends=True)
    return {
        "empty": b"",
        "one half": data[: len(data) // 2],
        "without its last byte": data[:-1],
        "a byte order mark first": b"\xef\xbb\xbf" + data,
        "UTF-16": text.encode("utf-16"),
        "Latin-1": text.replace("small", "schön").encode("latin-1", "replace") + b"\n# \xe4\n",
        "a NUL inside": data[:20] + b"\0" + data[20:],
        "carriage returns": text.replace("\n", "\r\n").encode(),
        "random bytes": bytes(range(256)) * 4,
        "zeros": bytes(len(data)),
        "twice": data + data,
        "a comma at the end": data.rstrip() + b",",
        "3,000 levels of brackets": b"[" * 3000 + b"]" * 3000,
        "3,000 levels in a key": lines[0].encode() + b"x: " + b"[" * 3000 + b"]" * 3000 + b"\n",
        "a list as a key": data + b"\n? [1, 2]\n: 3\n",
        "a mapping as a key": data + b"\n? {a: 1}\n: 3\n",
        "a merge key": b"<<: {name: x}\n" + data,
        "an alias to itself": data + b"\nx: &x [*x]\n",
        "aliases that double": data + b"\na: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        "a tag of Python's": data + b"\nx: !!python/object/apply:os.system [id]\n",
        "an unknown tag": data + b"\nx: !function a.b\n",
        "an unknown anchor": data + b"\nx: *nowhere\n",
        "a date as a value": data + b"\nname: 2024-01-01\n",
        "an impossible date": data + b"\nx: 2024-99-99\n",
        "a number of 5,000 digits": data + b"\nx: " + b"9" * 5000 + b"\n",
        "two documents": data + b"\n---\n" + data,
        "tabs": text.replace("  ", "\t").encode(),
        "1 MB of a comment": data + b"\n# " + b"x" * 1_000_000,
    }
