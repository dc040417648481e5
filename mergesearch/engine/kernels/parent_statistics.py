"""Statistics of the parents, computed piece by piece and kept between candidates, in bounded memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesearch.engine.kernels import native, orders
from mergesearch.engine.kernels.exact import exact_division
from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.program import Program, cut, make, spans
from mergesearch.engine.kernels.symbols import Symbol, replace, symbols_in
from mergesearch.engine.kernels.tables import Table
from mergesearch.methods.listening import Statistic, listening
from mergesearch.methods.sparse import rank_sums

# elements at a time: on the CPU few enough that torch leaves them to the one thread, on a device many
_PIECE, _DEVICE_PIECE = 2**15 - 2**10, 2**24
# the statistic's name, of which orders.py has another way
_RANK_SUMS = f"{rank_sums.__module__}.{rank_sums.__qualname__}"


class Cache:
    """Values by key, the least recently used dropped where they exceed `limit` bytes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes: int = 0
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Any) -> Any:
        with self._lock:
            entry = self._held.get(key)
            if entry is None:
                return None
            self._held.move_to_end(key)
            return entry[0]

    def put(self, key: Any, value: Any) -> Any:
        with self._lock:
            self.drop(key)
            size = _size(value)
            if size <= self.limit:
                self._held[key] = (value, size)
                self.nbytes += size
            while self.nbytes > self.limit:
                self.nbytes -= self._held.popitem(last=False)[1][1]
            return value

    def drop(self, key: Any) -> None:
        with self._lock:
            if key in self._held:
                self.nbytes -= self._held.pop(key)[1]


def _size(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return 200 + sum(_size(part) for part in value)
    if isinstance(value, dict):
        return 200 + sum(_size(part) for part in value.values())
    return 200 + (value.nbytes if isinstance(value, (Tensor, Table)) else 0)


class Request:
    """One statistic of a recording: what it is a function of, for any tensor of the group.

    Args:
        symbol: the statistic.
        small: what the small symbols among its inputs are for a tensor, asked with the symbol.

    Raises:
        Unsupported: its arguments are not elementwise.
    """

    def __init__(self, symbol: Symbol):
        self.symbol = symbol
        self.statistic: Statistic = symbol.what
        tree = (symbol.args, symbol.kwargs)
        self.big: list[Symbol] = list({s.number: s for s in symbols_in(tree) if s.big}.values())
        self.parents: list[Any] = leaves(self.big)
        self.program: Program | None = make(self.big, self.parents) if self.big else None
        scalars = [*self.program.scalars, *self.program.rows] if self.program else []
        asked = [s for s in (*symbols_in(tree), *scalars) if isinstance(s, Symbol)]
        self.small: list[Symbol] = [s for s in asked if not s.big]
        self.elements: list[Request] = [Request(e) for e in self.program.elements] if self.program else []
        self.identity: bytes = self._identity(tree, [s for s in scalars if isinstance(s, Tensor)])
        self.masked: bool = bool(self.program and self.program.words) or any(e.masked for e in self.elements)

    def _identity(self, tree: Any, numbers: Sequence[Tensor]) -> bytes:
        places = {s.number: i for i, s in enumerate(self.big)}
        shown = replace(tree, lambda s: f"<{places.get(s.number, 'small')}>")
        text = [self.statistic.name, self.program.source if self.program else "", repr(shown)]
        text += [repr(n.tolist()) for n in numbers] + [e.identity.hex() for e in self.elements]
        return hashlib.blake2b("\0".join(text).encode(), digest_size=16).digest()

    def key(self, operands: Operands, values: Sequence[Tensor]) -> Any:
        """What the statistic's value depends on."""
        named = tuple(operands.names[0 if p == "base" else p + 1] for p in self.parents)
        drawn = tuple(operands.masks) if self.masked else ()
        return (self.identity, named, drawn, *(v.numpy(force=True).tobytes() for v in values))


def leaves(symbols: Sequence[Symbol]) -> list[Any]:
    """The parents that big symbols are made of: "base" first, then the models' numbers."""
    seen: set[int] = set()
    parents: set[Any] = set()
    stack = list(symbols)
    while stack:
        symbol = stack.pop()
        if symbol.number in seen or not symbol.big:
            continue
        seen.add(symbol.number)
        if symbol.kind in ("base", "model"):
            parents.add("base" if symbol.kind == "base" else symbol.what)
        stack.extend(symbols_in((symbol.args, symbol.kwargs)))
    models = sorted(p for p in parents if p != "base")
    return (["base"] if "base" in parents else []) + models


class Statistics:
    """Answers requests, from what is kept where that is possible.

    Args:
        limit: the most bytes of small statistics and tables to keep.
        elements: the most bytes of statistics of the tensors' own shape (ranks) to keep.
    """

    def __init__(self, limit: int, elements: int):
        self.small: Cache = Cache(limit)
        self.elements: Cache = Cache(elements)

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return self.small.nbytes + self.elements.nbytes

    def answer(
        self, request: Request, operands: Operands, value: Callable[[Symbol], Tensor], key: Any = None
    ) -> Tensor:
        """The statistic for one tensor; `value` gives the small symbols that it depends on, `key` is the request's."""
        key = key or request.key(operands, [value(s) for s in request.small])
        cache = self.elements if request.statistic.per_element else self.small
        answer = cache.get(key)
        if answer is None:
            answer = self._compute(request, operands, value, key)
            cache.put(key, answer)
        return answer

    def answers(
        self, request: Request, operands: Sequence[Operands], values: Sequence[Callable[[Symbol], Tensor]]
    ) -> list[Tensor]:
        """The statistic for many tensors; on the CPU on all threads."""
        answers: list[Any] = [None] * len(operands)
        waiting = iter(range(len(operands)))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                answers[number] = self.answer(request, operands[number], values[number])

        if operands[0].models[0].device.type == "cpu":
            native.on_all_threads(work, len(operands))
        else:
            work()
        return answers

    def _compute(self, request: Request, operands: Operands, value: Callable[[Symbol], Tensor], key: Any) -> Tensor:
        how = request.statistic.how
        with listening(None), exact_division(operands.models[0].device):
            if request.program is None or how == "whole":
                return self._call(request, next(iter(self._blocks(request, operands, value, "whole"))), value)
            if how == "order":
                return self._order(request, operands, value, key)
            parts = [self._call(request, block, value) for block in self._blocks(request, operands, value, how)]
        return sum(parts[1:], parts[0]) if how == "sum" else torch.cat(parts)

    def _call(self, request: Request, big: Sequence[Tensor], value: Callable[[Symbol], Tensor]) -> Tensor:
        place = {s.number: i for i, s in enumerate(request.big)}
        args, kwargs = replace(
            (request.symbol.args, request.symbol.kwargs), lambda s: big[place[s.number]] if s.big else value(s)
        )
        if request.statistic.name == _RANK_SUMS and orders.here(args[0]):
            return orders.rank_sums(*args)
        return request.statistic.function(*args, **kwargs)

    def _order(self, request: Request, operands: Operands, value: Callable[[Symbol], Tensor], key: Any) -> Tensor:
        rank = request.symbol.args[1]
        rank = int(value(rank) if isinstance(rank, Symbol) else rank)

        def blocks() -> Iterator[Tensor]:
            return (block[0].flatten() for block in self._blocks(request, operands, value, "order"))

        values = [value(s) for s in request.small if s is not request.symbol.args[1]]
        place = ("table", _tree_identity(request), request.key(operands, values)[1:])
        table = self.small.get(place)
        if table is None:
            table = Table(blocks, request.symbol.args[0].numel())
        smallest = table.smallest(rank, blocks)
        self.small.put(place, table)  # it may have grown
        return smallest

    def _blocks(
        self, request: Request, operands: Operands, value: Callable[[Symbol], Tensor], how: str
    ) -> Iterator[tuple[Tensor, ...]]:
        """The big arguments, block by block: flat ones where the statistic minds neither shape nor order."""
        if request.program is None:
            yield ()
            return
        program = request.program
        parents = operands.parents(program.parents)
        elements = [self.answer(e, operands, value) for e in request.elements]
        rows = [_plain(r, value) for r in program.rows]
        flat = how in ("sum", "order") and not rows
        tensors = [t.reshape(-1) if flat else t for t in (*parents, *elements)]
        shape = tensors[0].shape
        size = shape.numel() if how == "whole" else _PIECE if tensors[0].device.type == "cpu" else _DEVICE_PIECE
        device = tensors[0].device
        scalars = pack([_plain(s, value) for s in program.scalars]).to(device)
        inner = max(1, shape[1:].numel()) if len(shape) > 1 else 1
        # a mask's words are cut at multiples of the window, which only flat blocks keep to
        for start, stop in spans(shape, flat, size) if how != "rows" or len(shape) > 1 else [(0, shape[0])]:
            keys = torch.tensor(program.keys(operands.masks, start * inner), dtype=torch.int32, device=device)
            pieces = [cut(t, start, stop, shape[0]) for t in (*tensors, *rows)]
            yield program.run(scalars, keys, *pieces)


def _tree_identity(request: Request) -> bytes:
    """As `Request.identity`, without the rank that is asked for."""
    program = request.program
    assert program is not None  # an order statistic is one of a tensor
    numbers = [s for s in (*program.scalars, *program.rows) if isinstance(s, Tensor)]
    text = [program.source, *(repr(n.tolist()) for n in numbers), *(e.identity.hex() for e in request.elements)]
    return hashlib.blake2b("\0".join(text).encode(), digest_size=16).digest()


def _plain(item: Any, value: Callable[[Symbol], Tensor]) -> Tensor:
    return value(item) if isinstance(item, Symbol) else item


def pack(scalars: Sequence[Tensor]) -> Tensor:
    """0-d floating tensors as one vector, float64."""
    return torch.stack([s.double().cpu() for s in scalars]) if scalars else torch.zeros(1, dtype=torch.float64)
