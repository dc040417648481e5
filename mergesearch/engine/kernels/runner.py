"""Candidates through elementwise kernels, with what the parents have in common kept between them.

What a candidate costs in Python does not grow with its tensors' elements: the recording of a method is kept, statistics
come stacked for all tensors of a shape, and one call makes every tensor that shares a program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesearch.engine.kernels import staging
from mergesearch.engine.kernels.batch import Batch, Group, Plan, Task
from mergesearch.engine.kernels.compiled import Compiler
from mergesearch.engine.kernels.exact import exact_division
from mergesearch.engine.kernels.program import BLOCK, WINDOW, Program, cut, spans
from mergesearch.engine.kernels.recording import Place, Recipe, Recording, Recordings, Values
from mergesearch.engine.kernels.statistics import Operands, Statistics
from mergesearch.engine.kernels.symbols import Unsupported, numbers
from mergesearch.errors import CandidateError

# tables of pointers that a plan keeps, one for each program that its groups came up with
_BATCHES = 32


@dataclass
class _Part:
    """A group's share of a candidate."""

    group: Group
    recording: Recording
    values: Values
    elements: list[list[Tensor]]

    @property
    def tensors(self) -> list[list[Tensor]]:
        """For each task the result and the program's arguments."""
        which = self.recording.program.parents
        return [
            [task.out, *task.operands.parents(which), *elements]
            for task, elements in zip(self.group.tasks, self.elements, strict=True)
        ]


class Runner:
    """Makes tensors by elementwise kernels where a method allows it, and by its plain definition elsewhere.

    Args:
        statistics: what is kept between candidates.
        compiler: where compiled kernels come from.
        block: elements of a block where there is no compiled kernel.
    """

    def __init__(self, statistics: Statistics, compiler: Compiler, block: int = BLOCK):
        self.statistics, self.compiler, self.block = statistics, compiler, block
        self.recordings = Recordings(statistics)
        self._stages: dict[torch.device, staging.Stage] = {}

    @torch.no_grad()
    def run(self, recipe: Recipe, tasks: Sequence[Task] | Plan) -> None:
        """Writes every task's tensor.

        Args:
            tasks: the tensors; as a `Plan` that is kept, what does not change between candidates is not done again.

        Raises:
            CandidateError: a tensor came out with NaN or infinity; those before and after it may be written.
        """
        plan = tasks if isinstance(tasks, Plan) else Plan(tasks)
        given = numbers(recipe.method, recipe.parameters)
        found: list[tuple[list[Task], Tensor]] = []
        alike: dict[Any, list[_Part]] = {}
        for group in plan.groups:
            try:
                part = self._part(recipe, group, given)
            except Unsupported:
                found.append((group.tasks, torch.stack([plain(recipe, task) for task in group.tasks])))
                continue
            key = self._batched(part)
            if key is None:
                bad = [self._one(part, i) for i in range(len(group.tasks))]
                found.append((group.tasks, torch.stack(bad)))
            elif group.out.device.type == "cpu" or key[-1]:
                alike.setdefault(key, []).append(part)
            else:  # at once: the device works while the next group is prepared
                found.append((group.tasks, self._batch(plan, key, [part])))
        for key, parts in alike.items():
            found.append(([t for part in parts for t in part.group.tasks], self._batch(plan, key, parts)))
        check_finite(recipe.method.name, found)

    def _part(self, recipe: Recipe, group: Group, given: Mapping[Place, float]) -> _Part:
        if group.operands[0].models[0].numel() == 0:
            raise Unsupported("there is nothing to merge")
        recording = self.recordings.get(recipe, group.operands[0], given)
        values = Values(recording, given, group.operands, self.statistics, group.token)
        return _Part(group, recording, values, values.elements(recording.elements))

    # --- a batch in one call ---

    def _batched(self, part: _Part) -> Any:
        """What parts have in common that are made in one call; None where this one is not."""
        program, group = part.recording.program, part.group
        if not group.whole or program.rows:
            return None
        tensors = [*group.operands[0].parents(program.parents), *part.elements[0]]
        dtypes, out = tuple(t.dtype for t in tensors), group.out
        homes = {t.device for t in tensors} - {out.device}
        if homes and (out.device.type != "cuda" or homes != {torch.device("cpu")}):
            return None
        if self.compiler.batched(program, out.dtype, dtypes, out.device) is None:
            return None
        return (program.source, out.dtype, out.device, dtypes, bool(homes))

    def _batch(self, plan: Plan, key: Any, parts: Sequence[_Part]) -> Tensor:
        """Makes the parts' tensors; which of them are not finite, (tensors,) bool."""
        _, dtype, device, dtypes, elsewhere = key
        program = parts[0].recording.program
        kernel = self.compiler.batched(program, dtype, dtypes, device)
        tensors = [one for part in parts for one in part.tensors]
        masks = [one.masks for part in parts for one in part.group.operands]
        scalars = _joined(parts)
        if elsewhere:
            stage = self._stages.setdefault(device, staging.Stage(device))
            return stage.run(kernel, program, tensors, masks, scalars)
        place = (key, tuple(part.group.token for part in parts))
        batch = plan.batches.get(place)
        if batch is None:
            while len(plan.batches) > _BATCHES:
                plan.batches.pop(next(iter(plan.batches)))
            batch = plan.batches[place] = Batch(
                [one[0].numel() for one in tensors], masks, program, kernel.chunk, device
            )
        batch.set(tensors, scalars)
        return staging.by_tensor(kernel(batch), batch.owners, len(tensors))

    # --- tensor by tensor ---

    def _one(self, part: _Part, number: int) -> Tensor:
        """Makes one tensor; whether it is not finite (0-d)."""
        program, task = part.recording.program, part.group.tasks[number]
        device = task.out.device
        tensors = [t.to(device) for t in part.tensors[number][1:]]
        rows = [r.to(device) for r in part.values.rows[number]]
        scalars = part.values.scalars[min(number, len(part.values.scalars) - 1)].to(device)
        out = task.out if task.out.ndim else task.out.reshape(1)
        tensors = [t if t.ndim else t.reshape(1) for t in tensors]
        whole = all(t.is_contiguous() for t in (out, *tensors))
        if whole and not program.rows:
            out, tensors = out.view(-1), [t.view(-1) for t in tensors]
        flags = []
        for start, stop in spans(out.shape, True, WINDOW) if out.ndim == 1 else [(0, out.shape[0])]:
            pieces = [cut(t, start, stop, out.shape[0]) for t in (*tensors, *rows)]
            flags.append(self._span(program, task.operands, out[start:stop], scalars, start, pieces, whole))
        return ~torch.stack(flags).all()

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
        dtypes = [p.dtype for p in pieces]
        # what the batches' compiler will do is not given to torch.compile meanwhile
        alone = program.rows or not self.compiler.batches(program, out.dtype, dtypes, out.device)
        # on CUDA torch.compile contracts products and sums, which is another result
        if whole and alone and min(out.shape) > 1 and out.device.type == "cpu":
            keys = _keys(program, operands, start, out.device)
            kernel = self.compiler.single(program, out, scalars, keys, pieces)
            if kernel is not None:
                return kernel(out, scalars, keys, *pieces)
        return self._blocks(program, operands, out, scalars, start, pieces)

    def _blocks(
        self, program: Program, operands: Operands, out: Tensor, scalars: Tensor, offset: int, pieces: Sequence[Tensor]
    ) -> Tensor:
        length, inner = out.shape[0], max(1, out.shape[1:].numel())
        kernel, flags = program.kernel, []
        size = self.block if out.device.type == "cpu" else max(self.block, 2**24)
        for start, stop in spans(out.shape, out.ndim == 1, size):
            keys = _keys(program, operands, offset + start * inner, out.device)
            with exact_division(out.device):
                flags.append(kernel(out[start:stop], scalars, keys, *(cut(p, start, stop, length) for p in pieces)))
        return torch.stack(flags).all()


def _keys(program: Program, operands: Operands, offset: int, device: torch.device) -> Tensor:
    return torch.tensor(program.keys(operands.masks, offset), dtype=torch.int32, device=device)


def _joined(parts: Sequence[_Part]) -> Tensor:
    """The scalars of all parts' tensors, one row for all where they are alike."""
    scalars = [part.values.scalars for part in parts]
    if all(len(s) == 1 and torch.equal(s, scalars[0]) for s in scalars):
        return scalars[0]
    return torch.cat([s.expand(len(part.group.tasks), -1) for s, part in zip(scalars, parts, strict=True)])


def plain(recipe: Recipe, task: Task) -> Tensor:
    """The method's plain definition over the whole tensor; whether the result is not finite (0-d)."""
    base, models = task.operands.base, task.operands.models
    device = task.out.device
    with exact_division(device):
        merged = recipe.method(
            None if base is None else base.to(device).float(),
            [m.to(device).float() for m in models],
            recipe.parameters,
            list(task.operands.masks) or None,
        ).to(task.out.dtype)
    task.out.copy_(merged)
    return ~torch.isfinite(merged).all()


def check_finite(method: str, found: Sequence[tuple[list[Task], Tensor]]) -> None:
    """`CandidateError` where one of the flags is true; the devices are waited for once."""
    on_cpu = [bad.to("cpu", non_blocking=True) for _, bad in found]
    for device in {bad.device for _, bad in found if bad.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    for (tasks, _), bad in zip(found, on_cpu, strict=True):
        if bad.any():
            raise CandidateError(f"{method} made NaN or infinity in {tasks[int(bad.nonzero()[0])].label}")
