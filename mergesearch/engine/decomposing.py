"""What a method of matrices will take before it begins: time for the parents, time for a candidate, room on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mergesearch.engine.kernels import Decompositions, Operands
from mergesearch.engine.kernels.decompositions import AT_ONCE, each_on_one_thread
from mergesearch.engine.plan import LEFT_OUT
from mergesearch.engine.residency import size_text
from mergesearch.methods import Method, mask_key
from mergesearch.methods.listening import listening
from mergesearch.recipe import TensorInfo

# the side of the matrices that are tried: large enough for the libraries' own speed, small enough for a moment
_SIDE = 192


@dataclass(frozen=True)
class MatrixWork:
    """About what a method takes for all matrices of a model.

    Attributes:
        once: seconds for the parents, unless that is on disk already.
        each: seconds for a candidate afterwards.
        kept: bytes on disk.
    """

    once: float
    each: float
    kept: int

    def __str__(self) -> str:
        once = f"about {_duration(self.once)} once for the parents and {size_text(self.kept)} on disk, then "
        return f"{once * bool(self.kept)}about {_duration(self.each)} a candidate"


def expected(method: Method, parameters: Mapping[str, Any], infos: Iterable[TensorInfo], models: int) -> MatrixWork:
    """What a method of matrices takes, by what it takes for one small matrix: times grow with out x in x min(out, in).

    Args:
        parameters: complete ones.
        infos: the tensors that it merges.
        models: how many.
    """
    wanted = [info for info in infos if parameters["embeddings"] or info.component not in LEFT_OUT]
    shapes = [info.shape for info in wanted if len(info.shape) == 2 and min(info.shape) > 1]
    work = sum(out * inner * min(out, inner) for out, inner in shapes) / _SIDE**3
    first, again, size = _tried(method, parameters, models)
    at_once = min(torch.get_num_threads(), AT_ONCE)
    kept = int(size * sum(out * inner for out, inner in shapes) / _SIDE**2)
    return MatrixWork(max(0.0, first - again) * work / at_once if kept else 0.0, again * work / at_once, kept)


def _tried(method: Method, parameters: Mapping[str, Any], models: int) -> tuple[float, float, int]:
    """Seconds of the first merge of a small matrix and of the second, and the bytes kept in between."""
    g = torch.Generator().manual_seed(0)
    base, *others = (torch.randn(_SIDE, _SIDE, generator=g) for _ in range(models + 1))
    operands = Operands(base, tuple(others), tuple(range(models + 1)))
    keys = [mask_key(0, str(number), "tried") for number in range(models)]
    kept = Decompositions(2**40)
    seconds = []
    # the first of all loads libraries
    for given in (kept, Decompositions(2**40), kept):
        start = time.perf_counter()
        each_on_one_thread(lambda _, given=given: _merged(method, parameters, operands, keys, given), 1)
        seconds.append(time.perf_counter() - start)
    return seconds[1], seconds[2], kept.held.nbytes


def _merged(
    method: Method, parameters: Mapping[str, Any], operands: Operands, keys: Any, kept: Decompositions
) -> torch.Tensor:
    with listening(kept.listener(operands)(operands.base, operands.models)):
        # what is measured of documents takes the time of any matrix of its shape
        given = [torch.eye(_SIDE)] * len(operands.models) if method.data else None
        return method(operands.base, operands.models, parameters, keys, given)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
