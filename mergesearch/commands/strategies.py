"""`mergesearch strategies`: every way to search, with its keys under `search`."""

from __future__ import annotations

import inspect
import json
from typing import Any

from rich.text import Text

from mergesearch import registry
from mergesearch.search import strategies


def described(name: str | None = None) -> list[dict[str, Any]]:
    """The strategies as plain data: all, or the one that is named.

    Raises:
        UserError: there is no such strategy.
    """
    if name:
        registry.get(name, "the command line")
    return [row for row in strategies.describe() if name in (None, row["name"])]


def as_json(name: str | None = None) -> str:
    """The strategies as JSON; raises as `described`."""
    return json.dumps(described(name), indent=1)


def lines_of(name: str | None = None) -> list[Text]:
    """The strategies in words; the one that is named with all that it says of itself. Raises as `described`."""
    lines = []
    for row in described(name):
        lines.append(Text.assemble((row["name"], "bold"), f"  {row['summary']}"))
        lines.append(Text(f"    {_place(row)}"))
        lines += [Text(f"    {_key(key)}") for key in row["keys"]]
    if name:
        lines.append(Text(f"\n{inspect.getdoc(registry.get(name, 'the command line')) or ''}"))
    return lines


def _place(row: dict[str, Any]) -> str:
    if not row["named"]:
        return "joins when its key asks for it"
    parts = ["named in search.strategy"]
    parts += ["part of auto"] * row["auto"]
    parts += ["goes on until the budget ends"] * row["open_ended"]
    return ", ".join(parts)


def _key(key: dict[str, Any]) -> str:
    default = json.dumps(key["default"]) if not isinstance(key["default"], str) else key["default"]
    return f"{key['key']} = {default} ({key['allowed']}): {key['meaning']}"
