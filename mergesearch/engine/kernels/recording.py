"""What a method does to the tensors of one shape: kept, it serves other numbers and other tensors of that shape.

From a recording (symbols.py) two lists follow. `Recording.requests` and `elements` are the statistics, asked for tensor
by tensor; `Recording.wanted` are the small symbols that the elementwise program reads: numbers made of parameters and
statistics. For other parameters and other tensors `Values` repeats the recorded steps on their numbers: the same
functions on the same dtypes, so with the result that the method itself would get. That the steps are the same for other
parameters is not taken on trust: whoever records runs the method a second time with all numbers changed
(`_holds_for_others`), and where the second list is another one, or a number was taken out of its tensor, the recording
serves its own numbers only.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.parent_statistics import Request, Statistics, leaves
from mergesearch.engine.kernels.program import Program, make
from mergesearch.engine.kernels.symbols import Symbol, Unsupported, numbers, part_of, record, replace, symbols_in
from mergesearch.methods import Method

Place = tuple[str, int | None]
_KEPT = 512
# operations that IEEE 754 has rounded to the nearest, and those that only choose, move or convert
_REFLECTED = {"add", "sub", "mul", "truediv", "div"}
_NEAREST = {
    *_REFLECTED, "subtract", "multiply", "divide", "true_divide", "neg", "negative", "abs", "absolute", "sqrt",
    "where", "clamp", "clamp_min", "clamp_max", "clip", "minimum", "maximum", "lt", "le", "gt", "ge", "eq", "ne",
    "and", "or", "xor", "invert", "logical_and", "logical_or", "logical_not", "floor", "ceil", "trunc", "isfinite",
    "isnan", "getitem", "select", "unbind", "stack", "unsqueeze", "squeeze", "reshape", "view", "expand", "clone",
    "detach", "to", "double", "float", "int", "long", "bool", "zeros_like", "ones_like", "full_like",
}  # fmt: skip


@dataclass(frozen=True)
class MethodCall:
    """How a group of tensors is merged: a method with complete parameters."""

    method: Method
    parameters: Mapping[str, Any]


class Recording:
    """Statistics and the elementwise rest of a method, for the tensors of one shape.

    Attributes:
        program: the elementwise rest.
        requests: the small statistics that it needs, in order.
        elements: the statistics of the tensors' own shape that it reads.
        read: the parameters by whose values something was decided, with those values: it holds for these alone.

    Raises:
        Unsupported: the method cannot be split into statistics and an elementwise rest.
    """

    def __init__(self, call: MethodCall, first: Operands, statistics: Statistics):
        given = numbers(call.method, call.parameters)
        answers: list[Tensor] = []
        self.requests: list[Request] = []

        def answer(symbol: Symbol) -> Tensor:
            self.requests.append(Request(symbol))
            answers.append(statistics.answer(self.requests[-1], first, lambda s: s.value).cpu())
            return answers[-1]

        result, reads = _record(call, first, answer)
        self.program: Program = make([result], leaves([result]) or [0])
        self.elements: list[Request] = [Request(e) for e in self.program.elements]
        if self.program.rows and self.program.words:
            raise Unsupported("random numbers beside values for each row")
        if not self._holds_for_others(call, first, given, reads, iter(answers)):
            reads = frozenset(given)
        self.read: dict[Place, float] = {place: given[place] for place in reads}
        # the statistics' answers hold parents; a kept recording must not
        result.tape.answer = None
        wanted = [v for v in (*self.program.scalars, *self.program.rows) if isinstance(v, Symbol)]
        wanted += [s for request in (*self.requests, *self.elements) for s in request.small]
        self.wanted: list[Symbol] = list({s.number: s for s in wanted}.values())
        self.parameters: list[Symbol] = _parameters_in(self.wanted)
        self.identity: object = object()

    def serves(self, given: Mapping[Place, float]) -> bool:
        return all(given[place] == value for place, value in self.read.items())

    def _holds_for_others(
        self,
        call: MethodCall,
        first: Operands,
        given: Mapping[Place, float],
        reads: frozenset[Place],
        answers: Iterator,
    ) -> bool:
        """Whether another recording, with other values of what was not read, is the same but for what follows from
        them: a method that takes a number out of its tensor behind our back is recorded anew for each value."""
        if reads >= given.keys():
            return True
        other = {place: v if place in reads else v * 0.999 + 1e-4 for place, v in given.items()}
        changed = MethodCall(call.method, _with(call.parameters, other))
        try:
            result, reads_now = _record(changed, first, lambda symbol: next(answers))
            again = make([result], leaves([result]) or [0])
        except (Unsupported, StopIteration):
            return False
        if again.source != self.program.source or reads_now != reads:
            return False
        known = _known(_parameters_in(self.program.scalars), other)
        pairs = zip((*self.program.scalars, *self.program.rows), (*again.scalars, *again.rows), strict=True)
        return all(_same(mine, theirs, known) for mine, theirs in pairs)


def _record(call: MethodCall, first: Operands, answer: Any) -> tuple[Symbol, frozenset[Place]]:
    specimen = first.models[0]
    shape = specimen.shape if specimen.ndim else torch.Size([1])
    return record(
        call.method, call.parameters, len(first.models), first.base is not None, shape, specimen.device, answer
    )


def _with(parameters: Mapping[str, Any], values: Mapping[Place, float]) -> dict[str, Any]:
    changed = dict(parameters)
    for (key, index), value in values.items():
        changed[key] = value if index is None else [*changed[key][:index], value, *changed[key][index + 1 :]]
    return changed


def _same(mine: Any, theirs: Any, known: dict[int, Tensor]) -> bool:
    """Whether a small value of one recording says what the other's is."""
    if not isinstance(mine, Symbol) or not isinstance(theirs, Symbol):
        return mine is theirs or (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs))
    return not mine.alike or torch.equal(_step(mine, known), theirs.value)


def _parameters_in(items: Sequence[Any]) -> list[Symbol]:
    """The parameters that small symbols are made of."""
    return _origins([s for s in items if isinstance(s, Symbol)], "parameter")


def _origins(symbols: Sequence[Symbol], kind: str) -> list[Symbol]:
    """The symbols of a kind that small symbols are made of; what statistics are made of does not count."""
    origins, stack, seen = [], list(symbols), set()
    while stack:
        symbol = stack.pop()
        if symbol.number not in seen:
            seen.add(symbol.number)
            origins += [symbol] if symbol.kind == kind else []
            stack += symbols_in((symbol.args, symbol.kwargs)) if symbol.kind == "step" else []
    return origins


def _known(symbols: Sequence[Symbol], given: Mapping[Place, float]) -> dict[int, Tensor]:
    return {s.number: torch.tensor(given[s.what], dtype=torch.float64) for s in symbols}


def _step(symbol: Symbol, known: dict[int, Tensor]) -> Tensor:
    """A small symbol's value from the statistics' and parameters' values."""
    if symbol.number not in known:
        if symbol.simple:
            args, kwargs = [_step(a, known) if type(a) is Symbol else a for a in symbol.args], symbol.kwargs
        else:
            args, kwargs = replace((symbol.args, symbol.kwargs), lambda s: _step(s, known))
        known[symbol.number] = symbol.what(*args, **kwargs)
    return known[symbol.number]


def _waiting(symbols: Sequence[Symbol], stacked: Mapping[int, Tensor], shared: dict[int, Tensor]) -> list[Symbol]:
    """The steps that differ from tensor to tensor and are not known yet, each after what it needs; what they need of
    the parameters is worked out into `shared`."""
    ordered: list[Symbol] = []
    seen = set(stacked)
    stack = [(symbol, False) for symbol in reversed(symbols)]
    while stack:
        symbol, ready = stack.pop()
        if ready:
            ordered.append(symbol)
        elif symbol.alike:
            _step(symbol, shared)
        elif symbol.number not in seen:
            seen.add(symbol.number)
            stack.append((symbol, True))
            stack.extend((other, False) for other in symbol.inputs)
    return ordered


def _is_nearest(symbol: Symbol) -> bool:
    """Whether a step's every element is the nearest number to what it stands for, see `Values._evaluate`."""
    return _rounds_to_nearest(symbol.args[0] if symbol.what is part_of else symbol.what)


@functools.cache
def _rounds_to_nearest(function: Any) -> bool:
    name = str(resolve_name(function) or getattr(function, "__name__", "")).rpartition(".")[2].strip("_")
    return name in _NEAREST or name.removeprefix("r") in _REFLECTED


class Recordings:
    """Recordings that are kept, the least recently used dropped."""

    def __init__(self, statistics: Statistics):
        self._statistics = statistics
        self._held: OrderedDict[Any, list[Recording]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, call: MethodCall, first: Operands, given: Mapping[Place, float]) -> Recording:
        """The recording for tensors like the first, see `Recording`."""
        with self._lock:
            return self._get(call, first, given)

    def _get(self, call: MethodCall, first: Operands, given: Mapping[Place, float]) -> Recording:
        held = self._held.setdefault(self._key(call, first), [])
        for recording in reversed(held):
            if recording.serves(given):
                return recording
        recording = Recording(call, first, self._statistics)
        held.append(recording)
        del held[:-8]
        while len(self._held) > _KEPT:
            self._held.popitem(last=False)
        return recording

    @staticmethod
    def _key(call: MethodCall, first: Operands) -> Any:
        kinds = call.method.parameters
        rest = [(k, len(v) if isinstance(v, (list, tuple)) else 0) if kinds[k].kind == "float" else (k, v)
                for k, v in call.parameters.items()]  # fmt: skip
        tensors = tuple((m.shape, m.dtype, m.device) for m in first.models)
        return (call.method.name, id(call.method.function), repr(rest), first.base is not None, tensors)


class Values:
    """The small values of a recording for many tensors: those of parameters once, the others stacked.

    Args:
        given: the parameters' values.
        operands: the tensors.
        token: names them all.
    """

    def __init__(
        self,
        recording: Recording,
        given: Mapping[Place, float],
        operands: Sequence[Operands],
        statistics: Statistics,
        token: Any,
    ):
        self._operands, self._statistics, self._token = operands, statistics, token
        program = recording.program
        self._shared = _known(recording.parameters, given)
        self._stacked: dict[int, Tensor] = {}
        key = ("values", recording.identity, token)
        kept = None if recording.parameters else statistics.small.get(key)
        if kept is None:
            for request in recording.requests:
                self._answer(request)
            self._evaluate(recording.wanted)
            wanted = {s.number for s in recording.wanted}
            kept = (self._columns(program.scalars), {n: v for n, v in self._stacked.items() if n in wanted})
            if not recording.parameters:
                statistics.small.put(key, kept)
        self.scalars: Tensor
        self.scalars, self._stacked = kept
        self.rows: list[list[Tensor]] = [[self.value(row, i) for row in program.rows] for i in range(len(operands))]

    def value(self, item: Any, number: int) -> Tensor:
        """What a small symbol or a constant is for one tensor."""
        if not isinstance(item, Symbol):
            return item
        return self._shared[item.number] if item.alike else self._stacked[item.number][number]

    def elements(self, requests: Sequence[Request]) -> list[list[Tensor]]:
        """The statistics of the tensors' own shape, for each tensor."""
        columns = []
        for request in requests:
            keys = self._keys(request)
            columns.append([
                self._statistics.answer(request, one, lambda s, i=i: self.value(s, i), key)
                for i, (one, key) in enumerate(zip(self._operands, keys, strict=True))
            ])  # fmt: skip
        return [list(one) for one in zip(*columns, strict=True)] if columns else [[] for _ in self._operands]

    def _keys(self, request: Request) -> Sequence[Any]:
        if request.small:
            return [None] * len(self._operands)
        place = ("keys", request.identity, tuple(request.parents), self._token)
        kept = self._statistics.small.get(place)
        return kept or self._statistics.small.put(place, [request.key(one, ()) for one in self._operands])

    def _answer(self, request: Request) -> None:
        """A statistic for all tensors."""
        self._evaluate(request.small)
        small = [self._shared[s.number] if s.alike else self._stacked[s.number] for s in request.small]
        key = ("stacked", request.identity, tuple(request.parents), self._token, *(v.numpy().tobytes() for v in small))
        stacked = self._statistics.small.get(key)
        if stacked is None:
            answers = self._statistics.answers(
                request, self._operands, [lambda s, i=i: self.value(s, i) for i in range(len(self._operands))]
            )
            stacked = self._statistics.small.put(key, torch.stack(answers).cpu())
        self._stacked[request.symbol.number] = stacked

    def _evaluate(self, symbols: Sequence[Symbol]) -> None:
        """Works out small symbols from what is known.

        What comes out for a tensor must not depend on which others are worked out with it, or a candidate's bytes would
        depend on how its tensors are grouped. So of the steps that differ from tensor to tensor only those are done for
        all at once whose every operation is in `_NEAREST`: its result is the number nearest to the exact one (or one of
        its operands, or an arrangement of them), wherever in a vector the element stands. A sine is not: the
        processor's vectors have one of their own, and what is left over at their end gets another. Neither is a sum,
        whose order depends on the shape. Those are done for each tensor alone, as the plain definition does them.
        """
        for symbol in symbols:
            if symbol.alike:
                _step(symbol, self._shared)
        waiting = _waiting([s for s in symbols if not s.alike], self._stacked, self._shared)
        while waiting:
            if _is_nearest(waiting[0]):
                steps = self._ready(waiting)
                self._stacked.update(zip((s.number for s in steps), self._together(steps), strict=True))
            else:
                self._stacked[waiting[0].number] = self._each_alone(waiting[0])
            waiting = [s for s in waiting if s.number not in self._stacked]

    def _ready(self, waiting: Sequence[Symbol]) -> list[Symbol]:
        """The steps that may be done for all tensors at once, their inputs known or before them in the list."""
        ready: list[Symbol] = []
        known = set(self._stacked)
        for symbol in waiting:
            if _is_nearest(symbol) and {s.number for s in symbol.differing} <= known:
                ready.append(symbol)
                known.add(symbol.number)
        return ready

    def _together(self, steps: Sequence[Symbol]) -> Sequence[Tensor]:
        """The values of `steps` for every tensor, stacked: in one call, where the operations can be batched."""
        inputs = {s.number for step in steps for s in step.differing}
        needed = sorted(inputs - {s.number for s in steps})

        def one(*values: Tensor) -> tuple[Tensor, ...]:
            known = {**self._shared, **dict(zip(needed, values, strict=True))}
            return tuple(_step(s, known) for s in steps)

        columns = [self._stacked[n] for n in needed]
        if len(self._operands) > 2:
            try:
                return torch.vmap(one)(*columns)
            except (RuntimeError, ValueError):
                pass  # an operation that cannot be batched
        rows = [one(*(c[i] for c in columns)) for i in range(len(self._operands))]
        return [torch.stack(part) for part in zip(*rows, strict=True)]

    def _each_alone(self, step: Symbol) -> Tensor:
        """The value of a step for every tensor, stacked: a call for each tensor."""
        count = len(self._operands)
        held = {s.number: self._parts(self._stacked[s.number]) for s in step.differing}
        if step.simple:
            columns = [
                held.get(a.number) or [self._shared[a.number]] * count if isinstance(a, Symbol) else [a] * count
                for a in step.args
            ]
            return torch.stack([step.what(*values) for values in zip(*columns, strict=True)])
        known = [{**self._shared, **{n: column[i] for n, column in held.items()}} for i in range(count)]
        return torch.stack([_step(step, one) for one in known])

    @staticmethod
    def _parts(stacked: Tensor) -> Sequence[Tensor]:
        """A stack taken apart. What has dimensions gets memory of its own: a product of matrices goes another way, and
        rounds otherwise, where its operands do not begin at the multiple of 64 bytes that torch's own memory does."""
        return [part.clone() for part in stacked.unbind()] if stacked.ndim > 1 else stacked.unbind()

    def _columns(self, scalars: Sequence[Any]) -> Tensor:
        """(tensors, scalars) float64, or (1, scalars) where all tensors have the same."""
        if not scalars:
            return torch.zeros(1, 1, dtype=torch.float64)
        if all(not isinstance(s, Symbol) or s.alike for s in scalars):
            return torch.stack([self.value(s, 0).double() for s in scalars])[None]
        count = len(self._operands)
        return torch.stack([
            self._stacked[s.number].double() if isinstance(s, Symbol) and not s.alike
            else self.value(s, 0).double().expand(count)
            for s in scalars
        ], dim=1)  # fmt: skip
