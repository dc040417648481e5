"""Weights as a sum of levels: the whole model's, what a group differs from that by, what a cell differs by from both.

Many weights learned from few documents fit what these documents happen to ask. As levels, what all tensors agree on
moves first and together, and what a group or a tensor does apart is pulled back towards 0 in every step, which is the
weight decay of Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, arXiv:1711.05101, on deviations
alone. How strongly is for folds of the documents to say, see `folds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mergesearch.recipe import TensorInfo


class Covers(Protocol):
    """A group of tensors: `space.Group` is one."""

    def covers(self, info: TensorInfo) -> bool: ...


@dataclass(frozen=True, eq=False)
class Levels:
    """Which of the raw numbers' rows each cell's weights are the sum of.

    Attributes:
        spread: float64 of 0 and 1, [cells, rows]: the first row is the whole model's.
    """

    spread: np.ndarray

    @classmethod
    def of(cls, infos: Sequence[TensorInfo], cell_of: Mapping[str, int], groups: Sequence[Covers]) -> Levels:
        """The whole model, then the groups, then the cells; a level that says what the one above it says is left out.

        Args:
            infos: the pool's tensors.
            cell_of: the cell of each tensor, by name.
            groups: that each cell lies in, by its first tensor; a cell outside all of them has no row there.
        """
        cells = 1 + max(cell_of.values())
        first: dict[int, TensorInfo] = {}
        for info in infos:
            if info.name in cell_of:
                first.setdefault(cell_of[info.name], info)
        inside = np.array([[float(group.covers(first[cell])) for group in groups] for cell in range(cells)])
        levels = [np.ones((cells, 1)), inside.reshape(cells, len(groups)), np.eye(cells)]
        kept = levels[:1]
        for level in levels[1:]:
            level = level[:, level.any(axis=0)]
            if level.shape[1] > kept[-1].shape[1]:
                kept.append(level)
        return cls(np.concatenate(kept, axis=1))

    @property
    def rows(self) -> int:
        """How many rows the raw numbers have."""
        return self.spread.shape[1]

    def weights(self, raw: Tensor) -> Tensor:
        """[cells, models] from [rows, models], float64; differentiable."""
        return torch.from_numpy(self.spread) @ raw

    def raw(self, values: np.ndarray) -> np.ndarray:
        """Each level the mean of what the levels above it leave of its cells, so that their sum gives the values.

        Args:
            values: float64, [cells, models].
        """
        left, rows = values.copy(), np.zeros((self.rows, values.shape[1]))
        for row in range(self.rows):
            mine = self.spread[:, row] > 0
            rows[row] = left[mine].mean(axis=0)
            left[mine] -= rows[row]
        return rows

    def shrunk(self, values: np.ndarray, share: float) -> np.ndarray:
        """The values with every deviation from the whole model's mean at a share of itself."""
        mean = values.mean(axis=0)
        return mean + share * (values - mean)
