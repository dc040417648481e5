"""`mergesearch strategies`: every way to search, with its keys under `search`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator

from rich.text import Text

from mergesearch import registry
from mergesearch.commands.listing import Row, lines, named
from mergesearch.search import strategies


def described(name: str | None = None) -> list[Row]:
    """The strategies as plain data: all, or the one that is named.

    Raises:
        UserError: there is no such strategy.
    """
    if name:
        registry.get(name, "the command line")
    return named(strategies.describe(), name)


def lines_of(name: str | None = None) -> list[Text]:
    """The strategies in words; the one that is named with all that it says of itself. Raises as `described`."""
    rows = described(name)
    return lines(rows, _details, (inspect.getdoc(registry.get(name, "the command line")) or "") if name else None)


def _details(row: Row) -> Iterator[str]:
    if row["named"]:
        parts = ["named in search.strategy", *["part of auto"] * row["auto"]]
        yield ", ".join([*parts, *["goes on until the budget ends"] * row["open_ended"]])
    else:
        yield "joins when its key asks for it"
    for key in row["keys"]:
        default = (
            key["default"] if isinstance(key["default"], str) else json.dumps(key["default"]).replace("null", "none")
        )
        yield f"{key['key']} = {default} ({key['allowed']}): {key['meaning']}"
