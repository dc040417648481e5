"""What a recipe means for a pool: for each tensor of the candidate what makes it, and the plain definition of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mergesearch import methods
from mergesearch.checkpoints import Form, Layout, Piece, Pool
from mergesearch.checkpoints.lowrank import expanded
from mergesearch.engine import kernels
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import BASE, TOWER, Measured, Recipe, Rule, TensorInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = Mapping[str, tuple[int, int]]
# what methods of matrices leave to the average: rows are tokens or experts there, not features
LEFT_OUT = ("embedding", "head", "router")


# --- what a recipe means ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a rule means for the pool at hand: the method, the models that take part, every parameter filled in."""

    method: methods.Method
    models: tuple[str, ...]
    parameters: dict[str, Any]
    statistics: Measured | None = None

    @cached_property
    def identity(self) -> str:
        """Equal for steps that do the same."""
        measured = [self.statistics.sha256] if self.statistics is not None else []
        return repr((self.method.name, self.models, sorted(self.parameters.items()), *measured))

    @cached_property
    def aside(self) -> Step:
        """What merges the tensors that a method of matrices leaves out."""
        return Step(methods.get(self.method.aside), self.models, self.method.complete_aside(self.parameters))

    def at(self, info: TensorInfo, depth: float | None) -> Step:
        """The step for one tensor.

        Args:
            depth: of the tensor's layer, from 0 to 1; None outside of the layers.
        """
        step = self
        if self.method.matrices and info.component in LEFT_OUT and not self.parameters["embeddings"]:
            step = self.aside
        if depth is not None and step.parameters.get("depth") == -1:
            step = Step(step.method, step.models, {**step.parameters, "depth": depth}, step.statistics)
        return step

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
        told = (("base", self.base, None if base is None else base._version), *names)
        return kernels.Operands(base, parents, told, masks, self.statistics(pool))

    def statistics(self, pool: Pool) -> Callable[[], list[Tensor | None]] | None:
        """Reads what the method goes by beside the parents, for each model; None for a method of parents alone."""
        stated = self.step.statistics
        if stated is None:
            return None
        files = pool.measured(stated)
        return lambda: [files.get(m, name) for m, name in zip(self.step.models, self.parents, strict=True)]


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
    steps: dict[int | None, Step] = {}
    for number, (first, last) in enumerate(_spans(recipe.stack)):
        if rule.layers is None or (rule.layers[0] <= last and first <= rule.layers[1]):
            names = _row_models(rule, recipe.stack[number], recipe, f"rules.{position}, row {number} of the stack")
            steps[number] = _complete(rule, recipe, names, f"rules.{position}")
    return steps


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
    complete = method.complete(given, names, where, has_base=recipe.base is not None)
    return Step(method, names, complete, _measured(method, recipe, where))


def _measured(method: methods.Method, recipe: Recipe, where: str) -> Measured | None:
    """The statistics that a method goes by; `UserError` where the recipe has none of their kind."""
    if method.data is None:
        return None
    if recipe.statistics is None or recipe.statistics.kind != method.data:
        has = "names none" if recipe.statistics is None else f"names {recipe.statistics.kind}"
        raise UserError(
            f"{where}: {method.name} goes by statistics of documents ({method.data}), and the recipe {has}: take "
            "the recipe of a strategy that measures them (`mergesearch strategies`), or another method"
        )
    return recipe.statistics


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
        _copied(info, piece, recipe)
        if info.component == TOWER and not any(rule.covers(info) for rule in recipe.rules)
        else _job(info, piece, steps[id(recipe.rule_for(info))], recipe, pool, _depth(piece, info, layout))
        for info, piece in zip(layout.infos, layout.pieces, strict=True)
    ]


def _depth(piece: Piece, info: TensorInfo, layout: Layout) -> float | None:
    """Where a tensor's layer lies, from 0 for the first to 1 for the last; None outside of the layers."""
    return info.layer / max(1, layout.layers - 1) if piece.live.startswith(layout.prefix) else None


def _copied(info: TensorInfo, piece: Piece, recipe: Recipe) -> Job:
    """A tensor of a tower that no rule names: the base's, or the first model's where there is no base."""
    names = (BASE,) if recipe.base is not None else tuple(recipe.models)[:1]
    method = methods.get("passthrough", "a tower")
    step = Step(method, names, method.complete({}, names, "a tower", has_base=recipe.base is not None))
    return Job(info, piece, step, None, (info.name,))


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


def _job(
    info: TensorInfo,
    piece: Piece,
    steps: Mapping[int | None, Step],
    recipe: Recipe,
    pool: Pool,
    depth: float | None,
) -> Job:
    if recipe.stack is None:
        step = steps[None].at(info, depth)
        return Job(info, piece, step, info.name if recipe.base is not None else None, (info.name,) * len(step.models))
    number, start = next((n, a) for n, (a, b) in enumerate(_spans(recipe.stack)) if a <= info.layer <= b)
    row, step, offset = recipe.stack[number], steps[number].at(info, depth), info.layer - start
    base_layers = row.get("base", _lead(row))
    base = _origin(piece, info, base_layers[0] + offset, "base", pool) if recipe.base is not None else None
    parents = tuple(_origin(piece, info, row[name][0] + offset, name, pool) for name in step.models)
    return Job(info, piece, step, base, parents)


def _origin(piece: Piece, info: TensorInfo, layer: int, name: str, pool: Pool) -> str:
    """The parents' tensor that stands in `layer` where `piece` stands in its own layer."""
    layout = pool.form.layout
    origin = layout.in_layer(piece, layer)
    if origin is None or origin.shape != piece.shape:
        raise UserError(
            f"stack: layer {layer} of {name} cannot become layer {info.layer} of the result, which needs {info.name}: "
            "stack layers of one structure"
        )
    return origin.name


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
        parents = [
            expanded(pool.parent(m).tensors[name]).float() for m, name in zip(step.models, job.parents, strict=True)
        ]
        keys = [methods.mask_key(seed, m, job.info.name) for m in step.models] if step.method.random else None
        read = job.statistics(pool)
        given = None if read is None else read()
        merged = step.method(base, parents, step.parameters, keys, given).to(dtypes[job.piece.live])
        if not torch.isfinite(merged).all():
            raise CandidateError(f"{step.method.name} made NaN or infinity in {job.info.name}")
        yield job, merged
