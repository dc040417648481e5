"""When learning has gone far enough, and which of the weights that it passed through are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Losses = Mapping[str, np.ndarray]  # task -> the loss of each validation document, float64, [n]


@dataclass
class EarlyStopping:
    """Keeps the latest weights that are not worse than the best ones beyond noise.

    The best look at the validation documents is the one with the lowest loss, sum_t f_t mean(loss_t). Another is worse
    than it where its loss is higher by more than one standard error of the difference, document by document, or than
    one of the best look's own loss: a few documents that get far worse make the first large, not the second. On few
    documents the lowest loss is often an accident of the first steps, while the loss on the many that are learned
    from still falls: so they may only refuse what is worse. It is the one-standard-error rule (Breiman et al.,
    "Classification and Regression Trees", 1984, section 3.4.3) with the later in the place of the simpler.

    Where the first weights were learned on the same documents before, the later have no such claim: they fit these
    documents more closely than the rest. There the first are kept until others are better than them beyond noise.

    Attributes:
        patience: so many looks in a row that are worse end the learning.
        factors: f_t, what a unit of each task's mean loss counts.
        best: the losses of the best look, None before the first.
        kept: its weights, or later ones that are not worse, float64, [cells, models].
        worse: how many looks in a row have been worse.
        again: whether the first weights were learned on the same documents.
        first: the losses of the first look, where `again` asks for them.
    """

    patience: int
    factors: dict[str, float] = field(default_factory=dict)
    best: dict[str, np.ndarray] | None = None
    kept: np.ndarray | None = None
    worse: int = 0
    again: bool = False
    first: dict[str, np.ndarray] | None = None

    def loss(self, losses: Losses) -> float:
        """sum_t f_t mean(loss_t)."""
        return float(sum(factor * losses[task].mean() for task, factor in self.factors.items()))

    def look(self, losses: Losses, values: np.ndarray) -> bool:
        """Takes note of a look; returns whether its weights are kept."""
        more, noise = self._behind(losses, self.best)
        if more > noise:
            self.worse += 1
            return False
        if more < 0:
            self.best = dict(losses)
        self.worse = 0
        if self.again and self.first is None:
            self.first = dict(losses)
        elif self.first:
            more, noise = self._behind(losses, self.first)
            if more >= -noise:
                return False
        self.kept = values.copy()
        return True

    @property
    def over(self) -> bool:
        """Whether patience is at its end."""
        return self.worse >= self.patience

    def _behind(self, losses: Losses, look: Losses | None) -> tuple[float, float]:
        """(how much higher the loss is than another look's, how much of that is noise); (-inf, 0) without one."""
        if look is None:
            return -math.inf, 0.0
        behind = {task: losses[task] - other for task, other in look.items()}
        return self.loss(behind), min(self._stderr(behind), self._stderr(look))

    def _stderr(self, losses: Losses) -> float:
        """The standard error of `loss`; a task with a single document says nothing about it."""
        return math.sqrt(
            sum(
                self.factors[task] ** 2 * float(each.var(ddof=1)) / len(each)
                for task, each in losses.items()
                if len(each) > 1
            )
        )

    # --- on disk -----------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """All but the settings, for JSON, after the first look."""
        assert self.kept is not None, "nothing was looked at yet"
        return {
            "best": {task: each.tolist() for task, each in (self.best or {}).items()},
            "kept": self.kept.tolist(),
            "worse": self.worse,
            **({} if self.first is None else {"first": {task: each.tolist() for task, each in self.first.items()}}),
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Puts back what `data` gave."""
        self.best = {task: np.array(each, dtype=np.float64) for task, each in data["best"].items()}
        self.kept = np.array(data["kept"], dtype=np.float64)
        self.worse = data["worse"]
        if "first" in data:
            self.first = {task: np.array(each, dtype=np.float64) for task, each in data["first"].items()}
