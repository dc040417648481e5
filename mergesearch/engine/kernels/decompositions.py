"""Decompositions of the parents' matrices: made once, kept in memory and on disk, whichever candidate asks.

A method calls a function marked `statistic(how="matrix")` with the base's and the models' own tensors. While a tensor
is merged, `Decompositions.listener` answers such calls: what was made of the same tensors by the same function is
taken from memory, or from disk, or made now and kept. So the plain definition is what runs, always; only the parts of
it that hang on the parents alone are not run again.

Which bytes come out of a decomposition hangs, in the last digits, on how many threads took part. So each matrix is
decomposed on one thread (`each_on_one_thread`), and several matrices at a time on several.
"""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mergesearch.engine.kernels.kept_files import KeptFiles
from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.parent_statistics import Cache
from mergesearch.methods.listening import Listener, Statistic
from mergesearch.methods.parts import MethodPart

T = TypeVar("T")
# a part, its tensors, its parameters by their names in Python, and a name for each tensor
MakePart = Callable[[MethodPart, Sequence[Tensor], dict[str, Any], Sequence[Any]], Tensor]
# raise it where a function gives other bytes than before: what an earlier version kept is then made anew
_FORMAT = 2
# matrices that are decomposed at once at most: each takes some copies of itself in float64
AT_ONCE = 16
# elements of all matrices below which a decomposition takes no longer than a file
_WORTH_A_FILE = 2**16


class Decompositions:
    """What was made of the parents' matrices.

    Args:
        limit: the most bytes to hold in memory; what is on disk and does not fit is read again when it is asked for.
        files: where it is kept on disk; None: nowhere.
        least: elements of a decomposition's matrices below which no file is written.
    """

    def __init__(self, limit: int, files: KeptFiles | None = None, least: int = _WORTH_A_FILE):
        self.held: Cache = Cache(limit)
        self.files: KeptFiles | None = files
        self.least = least
        self.made = 0
        self._contents: dict[Any, str] = {}
        self._lock = threading.Lock()

    def listener(
        self, operands: Operands, make: MakePart | None = None
    ) -> Callable[[Tensor | None, Sequence[Tensor]], Listener]:
        """What answers while a tensor of these parents is merged, given the tensors that the method is called with.

        Args:
            make: makes a part of a method, given a name for each of its tensors; None: it runs plainly.
        """

        def of(base: Tensor | None, models: Sequence[Tensor]) -> Listener:
            places = {id(model): number + 1 for number, model in reversed(list(enumerate(models)))}
            if base is not None:
                places[id(base)] = 0
            # by their memory, since a method may call a part with slices of them
            given: dict[int, tuple[Any, Tensor]] = {}

            def answer(statistic: Statistic, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if isinstance(statistic, MethodPart):
                    names = _names(args[1], given)
                    if make is not None and names is not None:
                        return make(statistic, args[1], kwargs, names)
                    return statistic.function(*args, **kwargs)
                stated = _stated((args, kwargs), places)
                if statistic.how != "matrix" or stated is None:
                    return statistic.function(*args, **kwargs)
                key = (statistic.name, repr(stated), tuple(operands.names), str(operands.models[0].device))
                answers = self._answer(key, operands, lambda: statistic.function(*args, **kwargs))
                given.update((t.untyped_storage().data_ptr(), ((key, n), t)) for n, t in enumerate(answers))
                return answers

            return answer

        return of

    def _answer(self, key: Any, operands: Operands, make: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        tensors = (operands.base, *operands.models)
        device = operands.models[0].device
        found = self.held.get(key)
        if found is not None:
            return found
        name = None
        if self.files is not None and len(operands.models) * operands.models[0].numel() >= self.least:
            digests = [self._content(n, t) for n, t in zip(operands.names, tensors, strict=True)]
            name = _named(*key[:2], *digests)
            found = self.files.read(name)
        if found is None:
            found = [t.cpu() for t in make()]
            with self._lock:
                self.made += 1
            if name is not None and self.files is not None:
                self.files.write(name, found)
        return self.held.put(key, tuple(t.to(device) for t in found))

    def _content(self, name: Any, tensor: Tensor | None) -> str:
        """A digest of a tensor's values, taken once for each tensor."""
        if tensor is None:
            return "none"
        known = self._contents.get(name)
        if known is None:
            values = tensor.detach().cpu().contiguous()
            told = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=20)
            told.update(values.view(torch.uint8).numpy().data)
            known = self._contents[name] = told.hexdigest()
        return known


def _names(tensors: Sequence[Tensor], given: dict[int, tuple[Any, Tensor]]) -> list[Any] | None:
    """What names each of the tensors: which decomposition gave it, and where it lies in it; None where one did not."""
    found = [given.get(t.untyped_storage().data_ptr()) for t in tensors]
    if any(one is None for one in found):
        return None
    return [
        (one[0], t.storage_offset() - one[1].storage_offset(), t.shape, t.stride())
        for one, t in zip(found, tensors, strict=True)
        if one is not None
    ]


def _stated(tree: Any, places: dict[int, int]) -> Any:
    """The arguments with every parent's tensor as its place; None where there is another tensor among them."""
    if isinstance(tree, Tensor):
        place = places.get(id(tree))
        return None if place is None else f"parent {place}"
    if isinstance(tree, dict):
        tree = sorted(tree.items())
    if isinstance(tree, (tuple, list)):
        parts = [_stated(part, places) for part in tree]
        return None if any(part is None for part in parts) else parts
    return repr(tree)


def _named(*parts: str) -> str:
    """The name of what is kept: of what made it of what, and with which library on which kind of processor."""
    told = [str(_FORMAT), torch.__version__, platform.machine(), *parts]
    return hashlib.blake2b("\0".join(told).encode(), digest_size=20).hexdigest()


def each_on_one_thread(work: Callable[[int], T], count: int) -> list[T]:
    """`work(0)`, `work(1)` and so on, several at a time, each with all of torch's operations on one thread."""
    threads = torch.get_num_threads()
    results: list[Any] = [None] * count
    waiting = iter(range(count))
    lock = threading.Lock()

    def take() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                results[number] = work(number)

    others = min(threads, AT_ONCE, count) - 1
    try:
        started = [_workers(threads).submit(take) for _ in range(others)]
        take()
        for other in started:
            other.result()
    finally:
        torch.set_num_threads(threads)
    return results


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(threads, AT_ONCE) - 1), thread_name_prefix="mergesearch-matrices")
