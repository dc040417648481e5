"""What a registry says of its entries, as lines: a name and a summary, then what is to be known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.text import Text

Row = dict[str, Any]


def named(rows: Iterable[Row], name: str | None) -> list[Row]:
    """All rows, or the one of a name."""
    return [row for row in rows if name in (None, row["name"])]


def lines(rows: Sequence[Row], details: Callable[[Row], Iterable[str]], whole: str | None) -> list[Text]:
    """The rows in words.

    Args:
        details: of a row, a line each.
        whole: what stands at the end; None for nothing.
    """
    words = []
    for row in rows:
        words.append(Text.assemble((row["name"], "bold"), f"  {row['summary']}"))
        words += [Text(f"    {detail}") for detail in details(row)]
    return words if whole is None else [*words, Text(f"\n{whole}")]
