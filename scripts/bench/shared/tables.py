"""Tables of results/*.md: every benchmark's rows become a frame, and every frame is printed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from mergesearch.results import markdown

AS_THEY_ARE: Mapping[str, str] = MappingProxyType({})


def lines(frame: pd.DataFrame, formats: Mapping[str, str] = AS_THEY_ARE) -> list[str]:
    """A frame as the lines of a Markdown table, without its index.

    Args:
        frame: its columns are the titles, and its texts are Markdown already.
        formats: how the cells of a column that are no texts are written, as `"{:.1%}"`; else as `str` writes them.
    """
    cells = [
        [cell if isinstance(cell, str) else formats.get(title, "{}").format(cell) for cell in column]
        for title, column in frame.items()
    ]
    return markdown.table([str(title) for title in frame.columns], [*zip(*cells, strict=True)]).splitlines()


def table(
    titles: Iterable[str], rows: Iterable[Sequence[object]], formats: Mapping[str, str] = AS_THEY_ARE
) -> list[str]:
    """Rows of cells under titles, which may occur twice, as the lines of a Markdown table, through a frame."""
    return lines(pd.DataFrame([[*row] for row in rows], columns=[*titles], dtype=object), formats)
