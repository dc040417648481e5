"""Candidates tensor by tensor through elementwise kernels, with what the parents have in common kept between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesearch.errors import CandidateError
from mergesearch.kernels.compiled import Compiler
from mergesearch.kernels.program import BLOCK, WINDOW, Program, cut, make, spans
from mergesearch.kernels.statistics import Operands, Request, Statistics, _leaves, pack
from mergesearch.kernels.symbols import Symbol, Unsupported, record, replace, symbols_in
from mergesearch.methods import Method

_NO_KEYS = torch.zeros(1, dtype=torch.int32)


@dataclass(frozen=True)
class Task:
    """One tensor to make: what from, where to, and what it is called in messages."""

    operands: Operands
    out: Tensor
    label: str


@dataclass(frozen=True)
class Recipe:
    """How a group of tensors is merged: a method with complete parameters."""

    method: Method
    parameters: Mapping[str, Any]


class Recording:
    """What a method does to the tensors of one shape.

    Raises:
        Unsupported: it cannot be split into statistics and an elementwise rest.
    """

    def __init__(self, recipe: Recipe, first: Operands, statistics: Statistics):
        specimen = first.models[0]
        shape = specimen.shape if specimen.ndim else torch.Size([1])
        self.shape = shape
        self.requests: list[Request] = []

        def answer(symbol: Symbol) -> Tensor:
            self.requests.append(Request(symbol))
            return statistics.answer(self.requests[-1], first, lambda s: s.value)

        result, _ = record(
            recipe.method, recipe.parameters, len(first.models), first.base is not None, shape, specimen.device, answer
        )
        self.program = make([result], _leaves([result]) or [0])
        self.elements = [Request(e) for e in self.program.elements]
        if self.program.rows and self.program.words:
            raise Unsupported("random numbers beside values for each row")

    @property
    def alike(self) -> bool:
        """Whether its scalars are the same for every tensor."""
        return not self.requests and not self.program.words and not self.program.elements

    def values(self, operands: Sequence[Operands], statistics: Statistics) -> tuple[Tensor, list[list[Tensor]]]:
        """The scalars (tensors, scalars), float64 on the CPU, and for each tensor the values of its rows."""
        known = [self._statistics(one, statistics) for one in operands]
        wanted = [v for v in (*self.program.scalars, *self.program.rows) if isinstance(v, Symbol)]
        steps = [v for v in wanted if v.kind == "step"]
        for one, found in zip(known, _together(steps, known), strict=True):
            one.update(found)
        rows = [[_value(r, one) for r in self.program.rows] for one in known]
        return torch.stack([pack([_value(s, one) for s in self.program.scalars]) for one in known]), rows

    def _statistics(self, operands: Operands, statistics: Statistics) -> dict[int, Tensor]:
        known: dict[int, Tensor] = {}
        for request in self.requests:
            known[request.symbol.number] = statistics.answer(request, operands, lambda s: _step(s, known))
        return known


def _value(item: Any, known: Mapping[int, Tensor]) -> Tensor:
    return known[item.number] if isinstance(item, Symbol) else item


def _step(symbol: Symbol, known: dict[int, Tensor]) -> Tensor:
    """A small symbol's value from the statistics' values."""
    if symbol.number not in known:
        args, kwargs = replace((symbol.args, symbol.kwargs), lambda s: _step(s, known))
        known[symbol.number] = symbol.what(*args, **kwargs)
    return known[symbol.number]


def _together(steps: Sequence[Symbol], known: Sequence[dict[int, Tensor]]) -> list[dict[int, Tensor]]:
    """The values of `steps` for every tensor: at once, or one by one where that is not possible."""
    if not steps:
        return [{} for _ in known]
    needed = sorted({s.number for s in _small_leaves(steps)})

    def one(*values: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(needed, values, strict=True))
        return tuple(_step(s, found) for s in steps)

    if len(known) > 2:
        try:
            stacked = torch.vmap(one)(*(torch.stack([k[n] for k in known]) for n in needed))
            return [{s.number: v[i] for s, v in zip(steps, stacked, strict=True)} for i in range(len(known))]
        except (RuntimeError, ValueError):
            pass  # an operation that cannot be batched
    return [dict(zip((s.number for s in steps), one(*(k[n] for n in needed)), strict=True)) for k in known]


def _small_leaves(steps: Sequence[Symbol]) -> list[Symbol]:
    found, stack, seen = [], list(steps), set()
    while stack:
        symbol = stack.pop()
        if symbol.number not in seen:
            seen.add(symbol.number)
            found += [symbol] if symbol.kind == "statistic" else []
            stack += symbols_in((symbol.args, symbol.kwargs)) if symbol.kind == "step" else []
    return found


class Runner:
    """Makes tensors by elementwise kernels where a method allows it, and by its plain definition elsewhere.

    Args:
        statistics: what is kept between candidates.
        compiler: where compiled kernels come from.
        block: elements of a block where there is no compiled kernel.
    """

    def __init__(self, statistics: Statistics, compiler: Compiler, block: int = BLOCK):
        self.statistics, self.compiler, self.block = statistics, compiler, block

    @torch.no_grad()
    def run(self, recipe: Recipe, tasks: Sequence[Task]) -> None:
        """Writes every task's tensor.

        Raises:
            CandidateError: a tensor came out with NaN or infinity; those before and after it may be written.
        """
        finite = []
        for group in _groups(tasks):
            finite += self._group(recipe, group)
        check_finite(recipe.method.name, tasks_in_order(_groups(tasks)), finite)

    def _group(self, recipe: Recipe, tasks: Sequence[Task]) -> list[Tensor]:
        """The tasks of one shape, and for each whether it came out finite."""
        first = tasks[0].operands
        try:
            if first.models[0].numel() == 0:
                raise Unsupported("there is nothing to merge")
            recording = Recording(recipe, first, self.statistics)
        except Unsupported:
            return [plain(recipe, task) for task in tasks]
        device = tasks[0].out.device
        some = [tasks[0].operands] if recording.alike else [t.operands for t in tasks]
        scalars, rows = recording.values(some, self.statistics)
        scalars = scalars.to(device, non_blocking=True)
        return [self._one(recording, task, scalars[i % len(some)], rows[i % len(some)]) for i, task in enumerate(tasks)]

    def _one(self, recording: Recording, task: Task, scalars: Tensor, rows: Sequence[Tensor]) -> Tensor:
        program, operands = recording.program, task.operands
        elements = [self.statistics.answer(e, operands, lambda s: s.value) for e in recording.elements]
        tensors = [t.to(task.out.device) for t in (*operands.parents(program.parents), *elements)]
        rows = [r.to(task.out.device) for r in rows]
        out = task.out if task.out.ndim else task.out.reshape(1)
        tensors = [t if t.ndim else t.reshape(1) for t in tensors]
        whole = all(t.is_contiguous() for t in (out, *tensors))
        if whole and not program.rows:
            out, tensors = out.view(-1), [t.view(-1) for t in tensors]
        flags = []
        for start, stop in spans(out.shape, True, WINDOW) if out.ndim == 1 else [(0, out.shape[0])]:
            pieces = [cut(t, start, stop, out.shape[0]) for t in (*tensors, *rows)]
            flags.append(self._span(program, operands, out[start:stop], scalars, start, pieces, whole))
        return flags[0] if len(flags) == 1 else torch.stack(flags).all()

    def _span(
        self,
        program: Program,
        operands: Operands,
        out: Tensor,
        scalars: Tensor,
        start: int,
        pieces: Sequence[Tensor],
        whole: bool,
    ) -> Tensor:
        if whole and (out.ndim == 1 or program.rows) and min(out.shape) > 1:
            keys = self._keys(program, operands, start, out.device)
            kernel = self.compiler.kernel(program, out, scalars, keys, pieces)
            if kernel is not None:
                return kernel(out, scalars, keys, *pieces)
        return self._blocks(program, operands, out, scalars, start, pieces)

    def _blocks(
        self, program: Program, operands: Operands, out: Tensor, scalars: Tensor, offset: int, pieces: Sequence[Tensor]
    ) -> Tensor:
        length, inner = out.shape[0], max(1, out.shape[1:].numel())
        kernel, flags = program.kernel, []
        for start, stop in spans(out.shape, out.ndim == 1, self.block):
            keys = self._keys(program, operands, offset + start * inner, out.device)
            flags.append(kernel(out[start:stop], scalars, keys, *(cut(p, start, stop, length) for p in pieces)))
        return torch.stack(flags).all()

    def _keys(self, program: Program, operands: Operands, offset: int, device: torch.device) -> Tensor:
        if not program.words:
            return _NO_KEYS if device.type == "cpu" else _NO_KEYS.to(device)
        return torch.tensor(program.keys(operands.masks, offset), dtype=torch.int32, device=device)


def plain(recipe: Recipe, task: Task) -> Tensor:
    """The method's plain definition over the whole tensor; whether the result is finite (0-d)."""
    base, models = task.operands.base, task.operands.models
    device = task.out.device
    merged = recipe.method(
        None if base is None else base.to(device).float(),
        [m.to(device).float() for m in models],
        recipe.parameters,
        list(task.operands.masks) or None,
    ).to(task.out.dtype)
    task.out.copy_(merged)
    return torch.isfinite(merged).all()


def _groups(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks of one shape, device and set of dtypes."""
    found: dict[Any, list[Task]] = {}
    for task in tasks:
        base = task.operands.base
        dtypes = (None if base is None else base.dtype, *(m.dtype for m in task.operands.models))
        found.setdefault((tuple(task.out.shape), task.out.device, dtypes), []).append(task)
    return iter(found.values())


def tasks_in_order(groups: Iterator[list[Task]]) -> list[Task]:
    return [task for group in groups for task in group]


def check_finite(method: str, tasks: Sequence[Task], flags: Sequence[Tensor]) -> None:
    """`CandidateError` where one of the flags is false."""
    if not flags:
        return
    device = flags[0].device
    found = torch.stack([f.to(device) for f in flags]).tolist()
    for task, good in zip(tasks, found, strict=True):
        if not good:
            raise CandidateError(f"{method} made NaN or infinity in {task.label}")
