"""Mixing coefficients: one number for each model and cell of a merge, and how the loss moves with each of them.

theta = ref + sum_k c_k (x_k - ref) in every cell: for task_arithmetic with ref the base and c = w, for linear with
c = w / sum w, where ref drops out. So dL/dc_k = <dL/dtheta, x_k - ref>: one backward pass gives every coefficient's
derivative, taken parameter by parameter while the pass runs. Learned soups: Wortsman et al., "Model soups", 2022,
arXiv:2203.05482; for each layer and task vector: Yang et al., "AdaMerging", 2023, arXiv:2310.02575, by entropy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mergesearch.checkpoints import Pool, parameters
from mergesearch.engine.plan import Job
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Recipe, Rule, TensorInfo
from mergesearch.search.soup.levels import Covers, Levels

Method = Literal["task_arithmetic", "linear"]
Parameterisation = Literal["free", "softmax"]

# task vectors are made so many numbers at a time
_BLOCK = 1 << 20
# below it `linear` does not divide by the sum of the weights
_LEAST_SUM = 1e-8


class Cell(Protocol):
    """The tensors that share coefficients: `space.Group` is one."""

    @property
    def layers(self) -> tuple[int, int]: ...
    @property
    def members(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True)
class Block:
    """Consecutive layers x components; None: all of them."""

    layers: tuple[int, int] | None = None
    members: tuple[str, ...] | None = None


class Coefficients:
    """The weights of K models in C cells; `values` are float64, [C, K], as they stand in the recipe's rules.

    Args:
        template: base, models, seed, out_dtype and tokenizer of every recipe; its rules do not count.
        infos: the pool's tensors.
        cells: `recipe`, one for everything; `tensor`, one for each tensor; or the groups of tensors, `space.Group`
            objects or what has their `layers` and `members`. The first that covers a tensor counts.
        method: `task_arithmetic`, or `linear`, normalised, where only the ratios of a cell's weights count.
        parameterisation: what an optimizer turns, its `raw` numbers. `free`: the weights themselves, any sign.
            `softmax`, over the models: for linear weights that are positive and sum to 1; for task_arithmetic the same
            times a positive factor for each cell, learned too.
        above: groups between the whole model and the cells. With them, or an empty list, the raw numbers of `free`
            weights are a sum of `Levels`.
        frozen: rules that stand before the cells'; what they cover belongs to no cell.
        low, high: the range of every weight, numbers or arrays that broadcast to [C, K]; equal ends freeze it. Only for
            `free`; `limit` moves a weight back into its range.

    Raises:
        UserError: tensors that no cell covers, a cell without tensors, a range with softmax or upside down.
    """

    def __init__(
        self,
        template: Recipe,
        infos: Sequence[TensorInfo],
        cells: Literal["recipe", "tensor"] | Sequence[Cell] = "recipe",
        *,
        method: Method = "task_arithmetic",
        parameterisation: Parameterisation = "free",
        frozen: Sequence[Rule] = (),
        low: Any = -np.inf,
        high: Any = np.inf,
        above: Sequence[Covers] | None = None,
    ):
        if method not in ("task_arithmetic", "linear"):
            raise UserError(f"a soup's method is {method!r}: use task_arithmetic or linear")
        if parameterisation not in ("free", "softmax"):
            raise UserError(f"a soup's parameterisation is {parameterisation!r}: use free or softmax")
        self.template = template
        self.method: Method = method
        self.parameterisation: Parameterisation = parameterisation
        self.models: tuple[str, ...] = tuple(template.models)
        self._frozen = tuple(frozen)
        infos = [info for info in infos if not any(rule.covers(info) for rule in self._frozen)]
        self._blocks = _blocks(cells, infos)
        self.cell_of: dict[str, int] = _cells(self._blocks, infos)
        self.shape: tuple[int, int] = (len(self._blocks), len(self.models))
        leveled = above is not None and parameterisation == "free"
        self.levels: Levels | None = Levels.of(infos, self.cell_of, above or ()) if leveled else None
        self.low: np.ndarray
        self.high: np.ndarray
        self.low, self.high = (np.broadcast_to(np.asarray(end, dtype=np.float64), self.shape) for end in (low, high))
        self._check_range()

    @property
    def free(self) -> np.ndarray:
        """Which weights may change: bool, [C, K]."""
        return self.low < self.high

    def recipe(self, values: np.ndarray) -> Recipe:
        """The recipe with these weights, an ordinary one: a rule for each cell.

        Raises:
            ValueError: another shape, or not finite.
        """
        values = self._checked(values)
        rules = [
            self._rule(number, {"weight": dict(zip(self.models, row, strict=True))})
            for number, row in enumerate(values.tolist())
        ]
        return self.template.model_copy(update={"rules": (*self._frozen, *rules), "stack": None})

    def full(self, value: float) -> np.ndarray:
        """The same weight everywhere."""
        return np.full(self.shape, value, dtype=np.float64)

    def limit(self, values: np.ndarray) -> np.ndarray:
        """The nearest values within the range."""
        return np.clip(values, self.low, self.high)

    # --- what an optimizer turns -------------------------------------------------------------------------------

    def within(self, raw: Tensor) -> Tensor:
        """The raw numbers with every weight moved into its range."""
        if self.parameterisation == "softmax":
            return raw
        values = self.weights(raw).numpy()
        limited = self.limit(values)
        return raw if (limited == values).all() else self.raw(limited)

    def decayed(self, raw: Tensor, share: float) -> Tensor:
        """The raw numbers with what groups and cells differ by from the levels above less by a share of itself."""
        return raw if self.levels is None else torch.cat([raw[:1], raw[1:] * (1 - share)])

    def raw(self, values: np.ndarray) -> Tensor:
        """The raw numbers of some weights: float64, [C, K], [C, K + 1] for softmax with a factor, [rows, K] of levels.

        Raises:
            UserError: softmax of weights that are not all positive.
        """
        weights = torch.from_numpy(self._checked(values).copy())
        if self.levels is not None:
            return torch.from_numpy(self.levels.raw(weights.numpy()))
        if self.parameterisation == "free":
            return weights
        if (weights <= 0).any():
            raise UserError(f"softmax weights are positive, a start of {weights.min():g} cannot be one: start above 0")
        total = weights.sum(1, keepdim=True)
        logits = (weights / total).log()
        return logits if self.method == "linear" else torch.cat([logits, total.log()], dim=1)

    def weights(self, raw: Tensor) -> Tensor:
        """The weights of raw numbers, [C, K]; differentiable."""
        if self.levels is not None:
            return self.levels.weights(raw)
        if self.parameterisation == "free":
            return raw
        count = len(self.models)
        shares = raw[:, :count].softmax(dim=1)
        return shares if self.method == "linear" else shares * raw[:, count:].exp()

    def values(self, raw: Tensor) -> np.ndarray:
        """The weights of raw numbers as an array."""
        return self.weights(raw.detach()).numpy().copy()

    def pull_back(self, products: np.ndarray, raw: Tensor) -> Tensor:
        """dL/draw from dL/dc, the inner products that `InnerProducts` took; frozen weights do not count.

        Raises:
            CandidateError: a cell's weights sum to 0, so that linear has no derivative.
        """
        leaf = raw.detach().clone().requires_grad_()
        with torch.enable_grad():
            weights = self.weights(leaf)
            weights = torch.where(torch.from_numpy(self.free), weights, weights.detach())
            self._mixture(weights).backward(torch.from_numpy(products).to(leaf.dtype))
        return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)

    def gradient(self, products: np.ndarray, values: np.ndarray) -> np.ndarray:
        """dL/dw, float64, [C, K], from dL/dc."""
        leaf = torch.from_numpy(self._checked(values).copy()).requires_grad_()
        with torch.enable_grad():
            self._mixture(leaf).backward(torch.from_numpy(products))
        assert leaf.grad is not None
        return leaf.grad.numpy()

    def _mixture(self, weights: Tensor) -> Tensor:
        if self.method == "task_arithmetic":
            return weights.clone()
        total = weights.sum(1, keepdim=True)
        if (total.abs() < _LEAST_SUM).any():
            raise CandidateError("the weights of a cell sum to 0: linear has no derivative there")
        return weights / total

    # --- cells -------------------------------------------------------------------------------------------------

    def _rule(self, number: int, parameters: Mapping[str, Any]) -> Rule:
        block = self._blocks[number]
        alone = isinstance(block, str)
        layers, components, tensors = (None, None, block) if alone else (block.layers, block.members, None)
        return Rule(
            layers=layers,
            components=components,
            tensors=tensors,
            method=self.method,
            models=self.models,
            parameters=dict(parameters),
        )

    def _checked(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if values.shape != self.shape or not np.isfinite(values).all():
            raise ValueError(f"weights of shape {values.shape}, finite or not: {self.shape} finite numbers are needed")
        return values

    def _check_range(self) -> None:
        if np.isnan(self.low).any() or np.isnan(self.high).any() or (self.low > self.high).any():
            raise UserError("a soup's range is upside down or no number: the first end must not exceed the second")
        if self.parameterisation == "softmax" and not (np.isinf(self.low) & np.isinf(self.high)).all():
            raise UserError("a soup's range or freeze does not go with softmax: use free coefficients")


def _blocks(cells: Any, infos: Sequence[TensorInfo]) -> list[Block | str]:
    """Blocks of layers and components, or for single tensors patterns that match their names alone."""
    if cells == "recipe":
        return [Block()]
    if cells == "tensor":
        return [_pattern(info.name) for info in infos]
    if isinstance(cells, str):
        raise UserError(f"a soup's cells are {cells!r}: use recipe, tensor or groups of layers and components")
    return [Block(tuple(cell.layers) if cell.layers else None, cell.members) for cell in cells]


def _pattern(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _cells(blocks: Sequence[Block | str], infos: Sequence[TensorInfo]) -> dict[str, int]:
    """The cell of each tensor, by name."""
    if blocks and isinstance(blocks[0], str):
        return {info.name: number for number, info in enumerate(infos)}
    rules = [Rule(layers=b.layers, components=b.members, method="linear") for b in blocks if isinstance(b, Block)]
    cell_of = {}
    for info in infos:
        number = next((number for number, rule in enumerate(rules) if rule.covers(info)), None)
        if number is None:
            raise UserError(f"no cell covers tensor {info.name!r} (layer {info.layer}, {info.component}): add one")
        cell_of[info.name] = number
    empty = sorted(set(range(len(rules))) - set(cell_of.values()))
    if empty:
        raise UserError(f"the cell {rules[empty[0]].label} has no tensors: leave it out")
    return cell_of


# --- derivatives ----------------------------------------------------------------------------------------------------


class InnerProducts:
    """Takes <dL/dtheta, x_k - ref> of every cell and model during backward passes, and frees each gradient at once.

    A context manager: inside, the live model's parameters ask for gradients, one by one taken and freed in a hook as
    soon as it is complete, so that beside the activations one parameter's gradient is held at a time. Task vectors are
    made in blocks, float32 (float64 where the gradient is), and never held. After it no parameter asks for a gradient
    and none holds one. Tied weights have one gradient, the sum over their uses; of fused weights each piece counts in
    its own cell.

    Args:
        cell_of: the cell of each tensor, by name.
        shape: cells and models.
        jobs: the plan of a recipe in which every rule merges all models, `engine.plan`.
    """

    def __init__(
        self, cell_of: Mapping[str, int], shape: tuple[int, int], jobs: Sequence[Job], model: nn.Module, pool: Pool
    ):
        self._pool, self._cell_of = pool, cell_of
        self._live = {name: t for name, t in parameters(model).items() if isinstance(t, nn.Parameter)}
        self._jobs: dict[str, list[Job]] = {}
        for job in jobs:
            if job.piece.live in self._live and job.info.name in cell_of:
                self._jobs.setdefault(job.piece.live, []).append(job)
        device = next(iter(self._live.values())).device
        self._total, self._pending = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self._apart = gradients_apart(model)
        self._padded = {m: m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
        self._handles: list[Any] = []

    def __enter__(self) -> InnerProducts:
        self._apart.__enter__()
        # a padding token gets no gradient, though it may well be a text's first token or its end
        for module in self._padded:
            module.padding_idx = None
        for name in self._jobs:
            parameter = self._live[name].requires_grad_()
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module, index in self._padded.items():
            module.padding_idx = index
        self._apart.__exit__(None, None, None)

    def commit(self) -> None:
        """What was taken since the last commit counts."""
        self._total += self._pending
        self._pending.zero_()

    def undo(self) -> None:
        """What was taken since the last commit is forgotten: the backward pass broke off."""
        self._pending.zero_()
        for parameter in self._live.values():
            parameter.grad = None

    def take(self) -> np.ndarray:
        """The committed inner products, float64, [C, K]; the count starts again."""
        taken = self._total.cpu().numpy().copy()
        self._total.zero_()
        return taken

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                live = {name: gradient.contiguous()}
                for job in self._jobs[name]:
                    self._add(job, job.piece.view(live))

        return hook

    def _add(self, job: Job, gradient: Tensor) -> None:
        row = self._pending[self._cell_of[job.info.name]]
        parents = [self._pool.parent(m).tensors[n] for m, n in zip(job.step.models, job.parents, strict=True)]
        reference = parents[0] if job.base is None else self._pool.base.tensors[job.base]
        for g, ref, *models in _pieces(gradient, reference, *parents):
            for number, model in enumerate(models):
                row[number] += torch.dot(g, model - ref).to(row.device)  # a part may live on another device


def _pieces(gradient: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """The tensors a block at a time, flat, on one device, float32 or the gradient's float64."""
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    everything = [tensor.reshape(1) if tensor.ndim == 0 else tensor for tensor in (gradient, *tensors)]
    rows = max(1, _BLOCK * everything[0].shape[0] // max(1, gradient.numel()))
    for parts in zip(*(tensor.split(rows) for tensor in everything), strict=True):
        yield [part.to(gradient.device, dtype).reshape(-1) for part in parts]


@contextmanager
def gradients_apart(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient but where the caller asks it to; afterwards each asks as before, none holds one.

    To leave them all without would make generation twice as slow on a CPU: aten::matmul multiplies the last position of
    many sequences by the head as one product only while the head's weight asks for a gradient, and else copies the
    weight for each sequence (torch 2.13, `should_fold`).
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
            parameter.grad = None
