"""What a worker gives to whoever finds a recipe on the search documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.search.history import History


@dataclass(frozen=True)
class Work:
    """The run so far, a place for how far it is, and whom to tell what it costs.

    Attributes:
        history: the run so far.
        state: where to keep how far it is; a later call for the same trial finds it there.
        spent: to be told the document evaluations of each step; on going on, first those of the earlier calls.
        stop: to be asked before every step; true once the budget is used up.
        note: adds to the trial's key.
        key: the trial's key when it was taken up, with what earlier calls noted.
    """

    history: History
    state: Path
    spent: Callable[[int], None]
    stop: Callable[[], bool]
    note: Callable[[Mapping[str, Any]], None]
    key: Mapping[str, Any] = field(default_factory=dict)
