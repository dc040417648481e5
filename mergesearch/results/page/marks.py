"""What all pictures have in common: colours by name, texts made harmless, the form in which a page takes a picture.

A picture is plain data of plotly's form. Colours stand in it by name (`@c0`, `@ink`) and become colours in the browser,
where it is known whether the page is light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INK, MUTED, GRID, SURFACE = "@ink", "@muted", "@grid", "@surface"
GOOD, BAD, LOW, HIGH = "@good", "@bad", "@low", "@high"
# one for each stage or model, in turns
SERIES = tuple(f"@c{number}" for number in range(8))
# every name that page.js has a colour for
NAMES = frozenset({INK, MUTED, GRID, SURFACE, GOOD, BAD, LOW, HIGH, *SERIES})
# longer names lose their middle on an axis; page.js makes them shorter still where there is less room
LONGEST = 44


@dataclass(frozen=True)
class Picture:
    """One picture of a page.

    Attributes:
        key: its id, unique on the page.
        views: by name, what is shown: `data` and `layout` as plotly takes them, and `rows`, the names on the vertical
            axis where it has names; a reader chooses where there are several.
        height: in CSS pixels.
        describes: what it shows, for who cannot see it.
    """

    key: str
    views: Mapping[str, Mapping[str, Any]]
    height: int
    describes: str

    def to_data(self) -> dict[str, Any]:
        return {"key": self.key, "height": self.height, "views": [{"name": n, **v} for n, v in self.views.items()]}


def one(key: str, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], height: int, describes: str,
        rows: Sequence[str] = ()) -> Picture:  # fmt: skip
    """A picture of one view."""
    return Picture(key, {"": view(data, layout, rows)}, height, describes)


def view(data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], rows: Sequence[str] = ()) -> dict[str, Any]:
    """One view of a picture."""
    return {"data": list(data), "layout": dict(layout), "rows": [" ".join(str(row).split()) for row in rows]}


def text(name: object) -> str:
    """A name for plotly, which reads some HTML in its texts: to the letter."""
    plain = " ".join(str(name).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(name: object, longest: int = LONGEST) -> str:
    """The same for an axis or a legend: a long one loses its middle."""
    plain = " ".join(str(name).split())
    if len(plain) > longest:
        head = (longest - 1) * 2 // 3
        plain = f"{plain[:head]}…{plain[head + 1 - longest :]}"
    return text(plain)


def finite(value: float | None) -> float | None:
    """None for what is no number, as JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def series(place: int) -> str:
    """The colour of the so-manieth of several."""
    return SERIES[place % len(SERIES)]


def whiskers(values: Sequence[float | None], lows: Sequence[float | None], highs: Sequence[float | None],
             color: str) -> dict[str, Any]:  # fmt: skip
    """Error bars from the values to the ends of their intervals; none where there is no interval."""
    above = [h - v if v is not None and h is not None else 0 for v, h in zip(values, highs, strict=True)]
    below = [v - w if v is not None and w is not None else 0 for v, w in zip(values, lows, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return {**bars, "color": color, "thickness": 1.5, "width": 0}


def rows_axis(labels: Sequence[str]) -> dict[str, Any]:
    """A vertical axis with a label for each row, the first on top. Numbers and not names stand for the rows, since two
    names may be shortened to the same."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": [short(label) for label in labels],
        "range": [len(labels) - 0.4, -0.6],
        "automargin": True,
        "zeroline": False,
        "showgrid": False,
        "fixedrange": True,
    }


LEGEND: dict[str, Any] = {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}
