"""`mergesearch methods`: every merge method with its parameters, their ranges, and the paper."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.text import Text

from mergesearch import methods

_BASE = {"required": "the base and ", "optional": "with or without the base, ", "unused": ""}


def described(name: str | None = None) -> list[dict[str, Any]]:
    """The methods as plain data: all, or the one that is named.

    Raises:
        UserError: there is no such method.
    """
    if name:
        methods.get(name, "the command line")
    return [row for row in methods.describe() if name in (None, row["name"])]


def as_json(name: str | None = None) -> str:
    """The methods as JSON; raises as `described`."""
    return json.dumps(described(name), indent=1)


def lines_of(name: str | None = None) -> list[Text]:
    """The methods in words; the one that is named with its mathematics. Raises as `described`."""
    lines = []
    for row in described(name):
        lines.append(Text.assemble((row["name"], "bold"), f"  {row['summary']}"))
        lines.append(Text(f"    merges {_BASE[row['base']]}{row['models']}; {row['paper']}"))
        lines += [Text(f"    {_parameter(parameter)}") for parameter in row["parameters"]]
    if name:
        lines.append(Text(f"\n{inspect.getdoc(methods.get(name).function) or ''}"))
    return lines


def _parameter(parameter: dict[str, Any]) -> str:
    each = ", one for each model" if parameter["per_model"] else ""
    low_high = parameter["search"]
    searched = f", searched in [{low_high[0]:g}, {low_high[1]:g}]" if low_high else ""
    default = str(parameter["default"]).lower() if isinstance(parameter["default"], bool) else parameter["default"]
    return f"{parameter['key']} = {default} ({parameter['allowed']}{each}{searched}): {parameter['meaning']}"
