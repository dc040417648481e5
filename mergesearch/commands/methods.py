"""`mergesearch methods`: every merge method and wrapper with its parameters, their ranges, and the paper."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from rich.text import Text

from mergesearch import methods
from mergesearch.commands.listing import Row, lines, named
from mergesearch.mergekit.known import EXPORTED

_NOT_EXPORTED = "no mergekit export can express it"
_BASE = {"required": "the base and ", "optional": "with or without the base, ", "unused": ""}


def described(name: str | None = None) -> list[Row]:
    """The methods and what may be wrapped around them as plain data: all, or the one that is named.

    Raises:
        UserError: there is no such method.
    """
    if name in methods.wrappers():
        return named(_wrapped(), name)
    if name:
        chosen = methods.get(name, "the command line")
        return _rows([chosen.name])
    return [*_rows([*methods.names(), *methods.data_names()]), *_wrapped()]


def _rows(names: Sequence[str]) -> list[Row]:
    return [{**row, "mergekit": row["name"] in EXPORTED} for row in methods.describe(names)]


def _wrapped() -> list[Row]:
    return [{**row, "mergekit": False, "wraps": True} for row in methods.describe_wrappers()]


def lines_of(name: str | None = None) -> list[Text]:
    """The methods in words; the one that is named with its mathematics. Raises as `described`."""
    return lines(described(name), _details, _mathematics(name) if name else None)


def _mathematics(name: str) -> str:
    told = methods.get_wrapper(name) if name in methods.wrappers() else methods.get(name)
    return inspect.getdoc(told.function) or ""


def _details(row: Row) -> Iterator[str]:
    if row.get("wraps"):
        yield f"written after a method, as in ties+{row['name']}; {row['paper']}; {_NOT_EXPORTED}"
    else:
        exported = "a mergekit export can express it" if row["mergekit"] else _NOT_EXPORTED
        if row["data"]:
            exported += "; goes by statistics of documents, which a strategy measures and states"
        yield f"merges {_BASE[row['base']]}{row['models']}; {row['paper']}; {exported}"
    yield from map(_parameter, row["parameters"])


def _parameter(parameter: Row) -> str:
    each = ", one for each model" if parameter["per_model"] else ""
    low_high = parameter["search"]
    searched = f", searched in [{low_high[0]:g}, {low_high[1]:g}]" if low_high else ""
    default = str(parameter["default"]).lower() if isinstance(parameter["default"], bool) else parameter["default"]
    return f"{parameter['key']} = {default} ({parameter['allowed']}{each}{searched}): {parameter['meaning']}"
