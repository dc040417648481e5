"""Tables of results/*.md: every benchmark's rows become a frame, and every frame is printed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from mergesearch.results import markdown


def frame(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> pd.DataFrame:
    """Rows of cells under titles, which may occur twice; cells are Markdown, and numbers have their digits already."""
    return pd.DataFrame([list(map(str, row)) for row in rows], columns=list(titles), dtype=str)


def lines(table: pd.DataFrame) -> list[str]:
    """A frame as the lines of a Markdown table, without its index."""
    cells = [[str(cell) for cell in row] for row in table.itertuples(index=False)]
    return markdown.table([str(title) for title in table.columns], cells).splitlines()


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Rows of cells under titles as the lines of a Markdown table, through a frame."""
    return lines(frame(titles, rows))
