"""A table laid out for a width: words fold, numbers never do, and columns that have no room are left out in an order.

rich's own tables shrink every column alike, and so fold or cut numbers; here a column that does not fit is left out
whole, and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest

from rich.cells import cell_len
from rich.text import Text

# how far words in cells and in titles fold, and how many blanks stand between columns, from loose to tight: tried in
# this order, and all of them before a column is left out; only the loose ones before one that is to spare is
LOOSE = ((24, 14, 2), (24, 8, 2))
TIERS = (*LOOSE, (16, 8, 2), (11, 8, 2), (11, 8, 1), (11, 6, 1))
# a title that would take more lines loses its middle
TITLE_LINES = 6
# where a word may be folded: after these, so that what follows begins the next line; never inside a number
_PIECES = re.compile(r"[_+/:,-]*[^_+/:,-]+[_+/:,-]*|[_+/:,-]+")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: what it is called where it is left out.
        title: its head; lines are separated by line breaks.
        cells: one a row; likewise.
        words: whether its cells are words, which may be folded; a number is folded nowhere, two of them between them.
        folds: whether its title may be folded inside a word.
        right: whether cells stand to the right.
        drop: when it is left out for want of room: the columns with the smallest number first; None for never.
        spare: whether it is left out before words are folded hard.
        styles: of each cell, as rich names them; none for the row's own.
    """

    name: str
    title: str
    cells: Sequence[str]
    words: bool = False
    folds: bool = False
    right: bool = True
    drop: int | None = None
    spare: bool = False
    styles: Sequence[str | None] = field(default=())

    def least(self, words: int, titles: int) -> int:
        """The narrowest it is with words in its cells, and in its title, kept together up to so many characters.

        Words that could stay in one line of that length do.
        """
        title, cells = self._kept_together
        cells = min(words, max(map(_width, self.cells), default=0)) if self.words else cells
        return max(min(titles, title) if self.folds else title, cells, 1)

    @cached_property
    def _kept_together(self) -> tuple[int, int]:
        """The longest pieces of the title and of the cells that are folded nowhere."""
        cells = [piece for cell in self.cells for piece in _pieces(cell, self.words)]
        return _longest(_pieces(self.title, self.folds)), _longest(cells)

    @cached_property
    def full(self) -> int:
        """As wide as it wants to be."""
        return max(map(_width, (self.title, *self.cells, " ")))


@dataclass(frozen=True)
class Arrangement:
    """Which columns are shown in a width, how wide, and which are left out."""

    columns: tuple[Column, ...]
    widths: tuple[int, ...]
    gap: int
    left_out: tuple[Column, ...]

    @property
    def width(self) -> int:
        """Of a whole line."""
        return sum(self.widths) + self.gap * max(0, len(self.widths) - 1)


def lay_out(columns: Sequence[Column], width: int | None = None) -> Arrangement:
    """The columns that fit into a width, each as wide as it wants to be where there is room.

    Words are folded before a column is left out. Columns that may not be left out are all there, in the narrowest
    layout where even that is too wide.

    Args:
        columns: from left to right.
        width: in cells of a terminal; None for as much as is needed.
    """
    if width is None:
        return Arrangement(tuple(columns), tuple(column.full for column in columns), LOOSE[0][2], ())
    droppable = sorted((c for c in columns if c.drop is not None), key=lambda column: column.drop or 0)
    layout = Arrangement((), (), 1, ())
    for count in range(len(droppable) + 1):
        gone = {id(column) for column in droppable[:count]}
        shown = [column for column in columns if id(column) not in gone]
        for layout in _narrowest(shown):
            if layout.width <= width:
                grown = _grown(layout, width - layout.width)
                return replace(layout, widths=grown, left_out=tuple(c for c in columns if id(c) in gone))
    return replace(layout, left_out=tuple(droppable))


def width_of_all(columns: Sequence[Column]) -> int:
    """The least width in which no column is left out."""
    return min(layout.width for layout in _narrowest(columns))


def _narrowest(columns: Sequence[Column]) -> Iterator[Arrangement]:
    """The columns as narrow as words folded more and more let them be."""
    for words, titles, gap in LOOSE if any(column.spare for column in columns) else TIERS:
        yield Arrangement(tuple(columns), tuple(column.least(words, titles) for column in columns), gap, ())


def _grown(layout: Arrangement, room: int) -> tuple[int, ...]:
    """The widths with what room is left, one cell at a time to each column that wants more."""
    grown = list(layout.widths)
    while room > 0:
        wanting = [place for place, column in enumerate(layout.columns) if grown[place] < column.full]
        if not wanting:
            break
        for place in wanting[:room]:
            grown[place] += 1
        room -= len(wanting[:room])
    return tuple(grown)


def lines_of(layout: Arrangement, styles: Sequence[str | None] = ()) -> Iterator[Text]:
    """The table line by line: the titles, a rule, the rows.

    Args:
        layout: as `lay_out` gives it.
        styles: of each row, as rich names them.
    """
    titles = [_title(column, width) for column, width in zip(layout.columns, layout.widths, strict=True)]
    height = max(map(len, titles), default=0)
    # a title stands right above the rule, whatever its height
    padded = [[""] * (height - len(title)) + title for title in titles]
    yield from _block(layout, padded, ["bold"] * len(titles))
    yield Text("─" * layout.width, style="dim")
    for row in range(len(layout.columns[0].cells) if layout.columns else 0):
        cells = [folded(c.cells[row], w, c.words) for c, w in zip(layout.columns, layout.widths, strict=True)]
        mine = [column.styles[row] if column.styles else None for column in layout.columns]
        style = styles[row] if styles else None
        yield from _block(layout, cells, [each or style for each in mine])


def _block(layout: Arrangement, cells: Sequence[Sequence[str]], styles: Sequence[str | None]) -> Iterator[Text]:
    """Cells beside each other, each of as many lines as it has."""
    for pieces in zip_longest(*cells, fillvalue=""):
        line = Text(no_wrap=True, overflow="ignore", end="\n")
        for place, (column, width, piece) in enumerate(zip(layout.columns, layout.widths, pieces, strict=True)):
            blank = " " * max(0, width - cell_len(piece))
            line.append(" " * layout.gap if place else "")
            line.append(blank + piece if column.right else piece + blank, style=styles[place])
        line.rstrip()
        yield line


def folded(text: str, width: int, words: bool = True) -> list[str]:
    """A text in lines of a width, broken at blanks and, if it is words, after `_`, `+`, `-` and their like, and inside
    a word where nothing else helps.

    What is no words and has no blank is one line, however long.
    """
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for blank, piece in _parts(paragraph, words):
            if line and cell_len(line) + blank + cell_len(piece) > width:
                lines.append(line)
                line = ""
            line += " " * (blank if line else 0) + piece
            while words and cell_len(line) > width:
                lines.append(line[:width])
                line = line[width:]
        lines.append(line)
    return lines


def _parts(text: str, words: bool) -> Iterator[tuple[int, str]]:
    """What is kept together, each with how many blanks stand before it."""
    for word in text.split():
        pieces = _PIECES.findall(word) if words else [word]
        yield from ((int(place == 0), piece) for place, piece in enumerate(pieces))


def _pieces(text: str, words: bool) -> list[str]:
    return [piece for _, piece in _parts(text, words)]


def _title(column: Column, width: int) -> list[str]:
    lines = folded(column.title, width, column.folds)
    return lines if len(lines) <= TITLE_LINES else [lines[0], "…", *lines[2 - TITLE_LINES :]]


def _width(text: str) -> int:
    return _longest(text.splitlines())


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)
