"""fusion-bench's recorded figures as an oracle: its results and ours on the same task vectors.

What was recorded how: record_fusion_bench.py. Used by test_methods_newer.py and by scripts/bench/parity.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mergesearch import methods

FILE = Path(__file__).parents[3] / "tests" / "data" / "fusion_bench.npz"


@dataclass(frozen=True)
class Recorded:
    """One result of fusion-bench's: the case, what it is called there, the task vectors, the merged one."""

    case: str
    label: str
    vectors: list[Tensor]
    theirs: Tensor

    @property
    def method(self) -> str:
        """Ours."""
        return _METHODS.get(self.label.split()[0], self.label.split()[0])

    def ours(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Our merged task vector, from a base of zeros."""
        base = torch.zeros_like(self.vectors[0], dtype=dtype)
        method = methods.get(self.method)
        parameters = method.complete(self._parameters(), [f"m{i}" for i in range(len(self.vectors))], "a case")
        return method(base, [v.to(dtype) for v in self.vectors], parameters)

    def _parameters(self) -> dict[str, float]:
        name, *numbers = self.label.split()
        given = [float(n) for n in numbers]
        if name == "iso_cts":
            return {"common": given[0]}
        if name == "svc":
            return {"floor": given[0]}
        if name == "knots":
            # its trimming keeps one element more than the share
            out, inner = self.vectors[0].shape
            elements = min(out, len(self.vectors) * inner) * inner
            return {"density": (int(elements * given[0] / 100) + 1.5) / elements}
        return {"l": given[0], "k": given[1]} if name == "consensus" else {}


# fusion-bench calibrates task arithmetic
_METHODS = {"svc": "task_arithmetic+svc"}


def version() -> str:
    """Of fusion-bench."""
    with np.load(FILE) as kept:
        return str(kept["version"])


def recorded() -> Iterator[Recorded]:
    """Every result but WUDI's, which fusion-bench stops early."""
    for one in _all():
        if one.label != "wudi":
            yield one


def stopped_early() -> Iterator[Recorded]:
    """WUDI after 400 steps."""
    return (one for one in _all() if one.label == "wudi")


def _all() -> Iterator[Recorded]:
    with np.load(FILE) as kept:
        for name in kept.files:
            case, _, label = name.partition("/")
            if label and label != "d":
                vectors = list(torch.from_numpy(kept[f"{case}/d"]))
                yield Recorded(case, label, vectors, torch.from_numpy(kept[name]))
