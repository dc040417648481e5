"""The merge engine: a recipe and a pool become tensors, in the live model or on their way to disk."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch import kernels, methods
from mergesearch.checkpoints import Form, Piece, Pool, parameters
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Recipe, Rule, TensorInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = Mapping[str, tuple[int, int]]
# plans that are kept: one for each group of a recipe and for each set of methods that came up lately
_PLANS = 64


# --- what a recipe means ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a rule means for the pool at hand: the method, the models that take part, every parameter filled in."""

    method: methods.Method
    models: tuple[str, ...]
    parameters: dict[str, Any]

    @cached_property
    def identity(self) -> str:
        """Equal for steps that do the same."""
        return repr((self.method.name, self.models, sorted(self.parameters.items())))

    @property
    def copies(self) -> bool:
        """Whether the result is the one model's tensor, bit for bit."""
        return self.method.name == "passthrough" and self.parameters["scale"] == 1.0


@dataclass(frozen=True)
class Job:
    """One tensor of the candidate and all that makes it.

    Attributes:
        info: the tensor: name, layer and component in the candidate.
        piece: where it lies in the candidate's live model.
        step: how it is merged.
        base: the base's tensor, by name; None in a recipe without base.
        parents: for each of the step's models the tensor that takes part, by name.
    """

    info: TensorInfo
    piece: Piece
    step: Step
    base: str | None
    parents: tuple[str, ...]

    def operands(self, pool: Pool, seed: int) -> kernels.Operands:
        """The stored tensors that it merges, and what names them: who, which tensor, how often it was written to."""
        models = self.step.models
        base = pool.base.tensors[self.base] if self.base is not None else None
        parents = tuple(pool.parent(m).tensors[n] for m, n in zip(models, self.parents, strict=True))
        names = tuple((m, n, t._version) for m, n, t in zip(models, self.parents, parents, strict=True))
        masks = tuple(methods.mask_key(seed, m, self.info.name) for m in models) if self.step.method.random else ()
        return kernels.Operands(
            base, parents, (("base", self.base, None if base is None else base._version), *names), masks
        )


def check(recipe: Recipe) -> list[Step]:
    """Each rule with its method looked up and every default filled in; what can be said before any model is read.

    With a stack a rule stands once for each row that has layers of its range.

    Raises:
        UserError: an unknown method or parameter, a value out of range, a method that needs a base without one.
    """
    return [step for position in range(len(recipe.rules)) for step in _steps(recipe, position).values()]


def _steps(recipe: Recipe, position: int) -> dict[int | None, Step]:
    """What one rule means for each row of the stack; for the whole model (None) where there is no stack."""
    rule = recipe.rules[position]
    if recipe.stack is None:
        return {None: _complete(rule, recipe, rule.models or tuple(recipe.models), f"rules.{position}")}
    found: dict[int | None, Step] = {}
    for number, (first, last) in enumerate(_spans(recipe.stack)):
        if rule.layers is None or (rule.layers[0] <= last and first <= rule.layers[1]):
            names = _row_models(rule, recipe.stack[number], recipe, f"rules.{position}, row {number} of the stack")
            found[number] = _complete(rule, recipe, names, f"rules.{position}")
    return found


def _spans(stack: Sequence[Row]) -> list[tuple[int, int]]:
    """First and last layer of the result that each row makes."""
    spans, start = [], 0
    for row in stack:
        first, last = next(iter(row.values()))
        spans.append((start, start + last - first))
        start += last - first + 1
    return spans


def _row_models(rule: Rule, row: Row, recipe: Recipe, where: str) -> tuple[str, ...]:
    """The models of a row that a rule merges; the base counts as a model where it stands alone."""
    if "base" in row and recipe.base is None:
        raise UserError(f"{where}: it takes layers of the base, but the recipe names none: give base")
    models = tuple(name for name in row if name != "base")
    if not models:
        return ("base",)
    if rule.models is None:
        return models
    chosen = tuple(name for name in rule.models if name in row)
    if not chosen:
        raise UserError(
            f"{where}: the rule merges {', '.join(rule.models)}, the row has {', '.join(row)}: add one of them"
        )
    return chosen


def _complete(rule: Rule, recipe: Recipe, names: tuple[str, ...], where: str) -> Step:
    method = methods.get(rule.method, where)
    everyone = rule.models or tuple(recipe.models)
    given = {
        key: _for_models(value, names, everyone)
        if key in method.parameters and method.parameters[key].per_model
        else value
        for key, value in rule.parameters.items()
    }
    return Step(method, names, method.complete(given, names, where, has_base=recipe.base is not None))


def _for_models(value: Any, names: tuple[str, ...], everyone: tuple[str, ...]) -> Any:
    """A per-model parameter, stated for all models of a rule, for those of them that a row has."""
    if names == everyone:
        return value
    if isinstance(value, Mapping):
        return {model: v for model, v in value.items() if model in names or model not in everyone}
    if isinstance(value, (list, tuple)) and len(value) == len(everyone) and set(names) <= set(everyone):
        return [value[everyone.index(name)] for name in names]
    return value


def plan(recipe: Recipe, pool: Pool, form: Form | None = None) -> list[Job]:
    """For each tensor of the candidate what makes it.

    Args:
        form: what the candidate looks like, if it is known already: `form_of(recipe, pool)`.

    Raises:
        UserError: an unknown method or parameter, a value out of range, a tensor that no rule covers, layers that the
            models do not have or that do not fit where the stack puts them.
    """
    for name in recipe.models:
        if name not in pool.models:
            raise UserError(f"recipe {recipe.id} names model {name!r}, not among the pool's {', '.join(pool.models)}")
    if recipe.tokenizer != pool.tokenizer_source:
        raise UserError(
            f"recipe {recipe.id} has tokenizer {recipe.tokenizer!r}, the models were aligned to "
            f"{pool.tokenizer_source!r}: use one of the two"
        )
    layout = (form or form_of(recipe, pool)).layout
    steps = {id(rule): _steps(recipe, position) for position, rule in enumerate(recipe.rules)}
    return [
        _job(info, piece, steps[id(recipe.rule_for(info))], recipe, pool)
        for info, piece in zip(layout.infos, layout.pieces, strict=True)
    ]


def form_of(recipe: Recipe, pool: Pool) -> Form:
    """What a recipe's candidate looks like: the pool's own form, or one with the layers of the stack.

    Raises:
        UserError: the stack names layers that the models do not have.
    """
    if recipe.stack is None:
        return pool.form
    for row in recipe.stack:
        for name, (_, last) in row.items():
            if last >= pool.layers:
                raise UserError(
                    f"stack: {name} has layers 0 to {pool.layers - 1}, not {last}: "
                    "give the first and the last layer, both included"
                )
    origins = [layer for row in recipe.stack for layer in range(_lead(row)[0], _lead(row)[1] + 1)]
    return pool.stacked(origins)


def _lead(row: Row) -> tuple[int, int]:
    """The layers that say what a row's layers are like: those of its first source."""
    return next(iter(row.values()))


def _job(info: TensorInfo, piece: Piece, steps: Mapping[int | None, Step], recipe: Recipe, pool: Pool) -> Job:
    if recipe.stack is None:
        step = steps[None]
        return Job(info, piece, step, info.name if recipe.base is not None else None, (info.name,) * len(step.models))
    number, start = next((n, a) for n, (a, b) in enumerate(_spans(recipe.stack)) if a <= info.layer <= b)
    row, step, offset = recipe.stack[number], steps[number], info.layer - start
    base_layers = row.get("base", _lead(row))
    base = _origin(piece, info, base_layers[0] + offset, "base", pool) if recipe.base is not None else None
    parents = tuple(_origin(piece, info, row[name][0] + offset, name, pool) for name in step.models)
    return Job(info, piece, step, base, parents)


def _origin(piece: Piece, info: TensorInfo, layer: int, name: str, pool: Pool) -> str:
    """The parents' tensor that stands in `layer` where `piece` stands in its own layer."""
    layout = pool.form.layout
    found = layout.in_layer(piece, layer)
    if found is None or found.shape != piece.shape:
        raise UserError(
            f"stack: layer {layer} of {name} cannot become layer {info.layer} of the result, which needs {info.name}: "
            "stack layers of one structure"
        )
    return found.name


# --- merging ------------------------------------------------------------------------------------------------------


def merge(
    jobs: Iterable[Job], pool: Pool, seed: int, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[Job, Tensor]]:
    """The merged tensors one after another, in float32 arithmetic and rounded once to `dtypes`, by live name.

    The plain definition, which `Engine.load` equals faster.

    Raises:
        CandidateError: a tensor came out with NaN or infinity.
    """
    for job in jobs:
        step = job.step
        base = pool.base.tensors[job.base].float() if job.base is not None else None
        parents = [pool.parent(m).tensors[name].float() for m, name in zip(step.models, job.parents, strict=True)]
        keys = [methods.mask_key(seed, m, job.info.name) for m in step.models] if step.method.random else None
        merged = step.method(base, parents, step.parameters, keys).to(dtypes[job.piece.live])
        if not torch.isfinite(merged).all():
            raise CandidateError(f"{step.method.name} made NaN or infinity in {job.info.name}")
        yield job, merged


class Engine:
    """One live model that stays loaded and takes on candidate after candidate in place.

    `model` is one object for the engine's lifetime, so that whoever scores it may hold on to it. A recipe with layer
    stacking changes what is inside: its configuration, its depth, its tensors. A stack's tensors that are passed
    through unchanged are the parents' own memory, not copies: do not write to them.

    What one candidate has in common with the one before it is not merged again; statistics of the parents are kept.

    Args:
        pool: the aligned parents.
        dtype: the dtype of the candidates, a recipe's `out_dtype`.
        compiled: when kernels are compiled: "background", "now" (before their first use) or "never"; None: in the
            background where candidates are large enough for it to pay.
    """

    def __init__(self, pool: Pool, dtype: str, compiled: kernels.When | None = None):
        self.runner = kernels.runner_for(pool.parameters, len(pool.models) + 1, pool.device, compiled)
        self._made: dict[tuple[str, int], Any] = {}
        self._tasks: dict[tuple[str, int], tuple[Any, kernels.Task]] = {}
        self._plans: OrderedDict[Any, kernels.Plan] = OrderedDict()
        self._versions: dict[str, int] = {}
        self.pool = pool
        self.dtype = dtype
        self.model: nn.Module = pool.new_model(DTYPES[dtype])
        self._form: Form | None = pool.form
        self._stack: Any = None
        self._live = parameters(self.model)
        self._shared: set[str] = set()

    @torch.no_grad()
    def load(self, recipe: Recipe) -> float:
        """Makes the live model the recipe's candidate and returns the seconds it took.

        A tensor that the architecture keeps in another dtype (say a router in float32) is rounded to that dtype.

        Raises:
            UserError: the recipe does not fit the pool.
            CandidateError: the merge came out with NaN or infinity; the live model is then half merged, and the next
                call overwrites it.
        """
        if recipe.out_dtype != self.dtype:
            raise UserError(f"recipe {recipe.id} has out_dtype {recipe.out_dtype}, the live model is {self.dtype}")
        started = time.perf_counter()
        same = self._form is not None and recipe.stack == self._stack
        form = self._form if same else form_of(recipe, self.pool)
        jobs = plan(recipe, self.pool, form)
        sources = _sources(jobs, self.pool) if recipe.stack is not None else {}
        if not same:
            self._rebuild(form, jobs, sources, recipe.stack)
        self._share(sources)
        self._write([job for job in jobs if job.piece.live not in self._shared], recipe.seed)
        return time.perf_counter() - started

    def identity(self, recipe: Recipe) -> str:
        """Equal for recipes that do the same to every tensor, however their rules are cut."""
        jobs = plan(recipe, self.pool, form_of(recipe, self.pool))
        random = any(job.step.method.random for job in jobs)
        told = [(job.info.name, job.step.identity, job.base, job.parents) for job in jobs]
        return hashlib.sha256(repr((told, recipe.seed if random else None)).encode()).hexdigest()[:16]

    def _write(self, jobs: Sequence[Job], seed: int) -> None:
        """Merges the tensors that are not yet what they should be, those of one step together."""
        made: dict[tuple[str, int], Any] = {}
        steps: dict[str, list[tuple[Job, kernels.Task]]] = {}
        touched = {name for name, tensor in self._live.items() if tensor._version != self._versions.get(name)}
        for job in jobs:
            task, place = self._task(job, seed), (job.piece.live, job.piece.offset)
            made[place] = (job.step.identity, task.operands.names, task.operands.masks)
            if job.piece.live in touched or self._made.get(place) != made[place]:
                steps.setdefault(job.step.identity, []).append((job, task))
        self._made = {}  # nothing is certain, should this fail
        for step in steps.values():
            how = step[0][0].step
            self.runner.run(kernels.Recipe(how.method, how.parameters), self._plan([task for _, task in step]))
        self._made = made
        self._versions = {name: tensor._version for name, tensor in self._live.items()}

    def _task(self, job: Job, seed: int) -> kernels.Task:
        """What makes a tensor: the same object as for the candidate before, where it is made of the same."""
        place = (job.piece.live, job.piece.offset)
        operands = job.operands(self.pool, seed)
        named = (operands.names, operands.masks)
        held = self._tasks.get(place)
        if held is None or held[0] != named:
            held = self._tasks[place] = (named, kernels.Task(operands, job.piece.view(self._live), job.info.name))
        return held[1]

    def _plan(self, tasks: list[kernels.Task]) -> kernels.Plan:
        """The plan for these tasks, kept for the next candidate that has the same."""
        key = tuple(map(id, tasks))
        if key not in self._plans:
            self._plans[key] = kernels.Plan(tasks)
        self._plans.move_to_end(key)
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]

    def _rebuild(self, form: Form, jobs: Sequence[Job], sources: Mapping[str, Tensor], stack: Any) -> None:
        """Puts a model of another form into the live model's place, as yet without the candidate's weights."""
        self._form = None  # nothing to go on from, should this fail
        for tensor in self._live.values():
            tensor.data = tensor.data.new_empty(0)
        self._live, self._shared, self._made = {}, set(), {}
        self._tasks.clear()
        self._plans.clear()
        dtype, device = DTYPES[self.dtype], self.pool.device
        tensors = {job.piece.live: _origin_tensor(job, self.pool) for job in jobs}
        for name, tensor in tensors.items():
            if name not in sources or tensor.dtype != dtype:
                tensors[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
        made = form.blueprint.build({**tensors, **self.pool.constants_of(form)}, dtype, device)
        self.model.__dict__.clear()
        self.model.__dict__.update(made.__dict__)
        self._live = parameters(self.model)
        self._form, self._stack = form, stack

    def _share(self, sources: Mapping[str, Tensor]) -> None:
        """Lets the tensors in `sources` be the parents' memory, and gives those that were it memory of their own."""
        if sources or self._shared:
            self._tasks.clear()  # views of tensors that get other memory
            self._plans.clear()
        for name, tensor in self._live.items():
            source = sources.get(name)
            if source is not None and (source.dtype, source.device) == (tensor.dtype, tensor.device):
                tensor.data = source
                self._shared.add(name)
                self._versions.pop(name, None)
            elif name in self._shared:
                tensor.data = torch.empty_like(tensor)
                self._shared.discard(name)


def _origin_tensor(job: Job, pool: Pool) -> Tensor:
    """The live tensor of the job's first parent that the candidate's live tensor is made of."""
    return pool.parent(job.step.models[0]).live[pool.form.layout.named[job.parents[0]].live]


def _sources(jobs: Iterable[Job], pool: Pool) -> dict[str, Tensor]:
    """The candidate's live tensors that are one parent's live tensor passed through unchanged, with that tensor."""
    found: dict[str, list[Tensor]] = {}
    for job in jobs:
        found.setdefault(job.piece.live, []).append(_origin_tensor(job, pool) if job.step.copies else None)
    return {
        name: tensors[0]
        for name, tensors in found.items()
        if tensors[0] is not None and all(tensor is tensors[0] for tensor in tensors)
    }
