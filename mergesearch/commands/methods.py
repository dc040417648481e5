"""`mergesearch methods`: every merge method with its parameters, their ranges, and the paper."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from rich.text import Text

from mergesearch import methods
from mergesearch.commands.listing import Row, lines, named

_BASE = {"required": "the base and ", "optional": "with or without the base, ", "unused": ""}


def described(name: str | None = None) -> list[Row]:
    """The methods as plain data: all, or the one that is named.

    Raises:
        UserError: there is no such method.
    """
    if name:
        methods.get(name, "the command line")
    return named(methods.describe(), name)


def lines_of(name: str | None = None) -> list[Text]:
    """The methods in words; the one that is named with its mathematics. Raises as `described`."""
    rows = described(name)
    return lines(rows, _details, (inspect.getdoc(methods.get(name).function) or "") if name else None)


def _details(row: Row) -> Iterator[str]:
    yield f"merges {_BASE[row['base']]}{row['models']}; {row['paper']}"
    yield from map(_parameter, row["parameters"])


def _parameter(parameter: Row) -> str:
    each = ", one for each model" if parameter["per_model"] else ""
    low_high = parameter["search"]
    searched = f", searched in [{low_high[0]:g}, {low_high[1]:g}]" if low_high else ""
    default = str(parameter["default"]).lower() if isinstance(parameter["default"], bool) else parameter["default"]
    return f"{parameter['key']} = {default} ({parameter['allowed']}{each}{searched}): {parameter['meaning']}"
