"""Text from names, paths and messages as Markdown shows it: to the letter, and never as Markdown of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

# what would begin code, HTML, a cell, the target of a link or a reference to a character
_SPECIAL = {"\\": "\\\\", "`": "\\`", "<": "&lt;", "|": "\\|", "](": "]\\(", "&": "&amp;"}
_PATTERN = re.compile("|".join(map(re.escape, sorted(_SPECIAL, key=len, reverse=True))))


def plain(text: str) -> str:
    """The text in one line, for a paragraph, a heading or the cell of a table."""
    return _PATTERN.sub(lambda found: _SPECIAL[found.group()], _line(text))


def code(text: str) -> str:
    """The text in one line as code; not for a cell of a table, which a bar would end."""
    line = _line(text)
    ticks = "`" * (1 + _longest_run(line))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def block(text: str, language: str = "") -> str:
    """The text as a block of code, which nothing in it can end."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}\n{fence}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; what comes of names went through `plain`."""
    lines = [list(map(_line, row)) for row in (titles, *rows)]
    head, *body = ["| " + " | ".join(row) + " |" for row in lines]
    return "\n".join([head, "|" + "---|" * len(titles), *body])


def _line(text: str) -> str:
    return " ".join(text.split())


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
