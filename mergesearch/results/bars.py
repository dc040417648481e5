"""Numbers as bars of block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bars(values: Sequence[float | None], width: int = WIDTH) -> list[str]:
    """A bar for each value, all on one scale, the longer the better.

    The scale begins at 0, and what is below goes to the left of it. Should all be below, it begins at the worst. One
    value far below the others must not squeeze them: nothing goes further to the left than the best to the right, and
    what would ends in an arrow.

    Args:
        values: None, NaN or infinite for none, which has no bar.
        width: of the longest, in characters.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    best, worst = max(known, default=0.0), min(known, default=0.0)
    if best <= 0:
        return [_from_worst(value, worst, best, width) for value in values]
    below = min(-worst, best / 2)
    left = 0 if worst >= 0 else max(1, round(width * below / (below + best)))
    unit = best / (width - left)
    return [_bar(value, unit, left) for value in values]


def _from_worst(value: float | None, worst: float, best: float, width: int) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return _to_the_right((value - worst) / (best - worst) * width if best > worst else 0.0)


def _bar(value: float | None, unit: float, left: int) -> str:
    if value is None or not math.isfinite(value):
        return ""
    if value >= 0:
        return " " * left + _to_the_right(value / unit)
    length = -value / unit
    if length > left:
        return "◂" + "█" * (left - 1)
    # there is no block that is filled from the right but the half one
    halves = round(2 * length)
    bar = "▐" * (halves % 2) + "█" * (halves // 2)
    return bar.rjust(left)


def _to_the_right(length: float) -> str:
    whole, eighths = divmod(round(8 * length), 8)
    return "█" * whole + (_EIGHTHS[eighths] if eighths else "")
