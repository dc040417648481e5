"""The merge engine: a recipe and a pool become tensors, in the live model or on their way to disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch import methods
from mergesearch.checkpoints import Pool, floating_tensors
from mergesearch.errors import CandidateError, UserError
from mergesearch.recipe import Recipe, Rule, TensorInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Step:
    """What a rule means for the pool at hand: the method, the models that take part, every parameter filled in."""

    method: methods.Method
    models: tuple[str, ...]
    parameters: dict[str, Any]


def plan(recipe: Recipe, pool: Pool) -> list[tuple[TensorInfo, Step]]:
    """For each tensor of the pool the step that merges it.

    Raises:
        UserError: an unknown method or parameter, a value out of range, a tensor that no rule covers.
    """
    for name in recipe.models:
        if name not in pool.models:
            raise UserError(f"recipe {recipe.id} names model {name!r}, not among the pool's {', '.join(pool.models)}")
    steps = dict(zip(map(id, recipe.rules), check(recipe), strict=True))
    return [(info, steps[id(recipe.rule_for(info))]) for info in pool.infos]


def check(recipe: Recipe) -> list[Step]:
    """Each rule with its method looked up and every default filled in; what can be said before any model is read.

    Raises:
        UserError: an unknown method or parameter, a value out of range, a method that needs a base without one.
    """
    return [_complete(rule, recipe, f"rules.{position}") for position, rule in enumerate(recipe.rules)]


def _complete(rule: Rule, recipe: Recipe, where: str) -> Step:
    method = methods.get(rule.method, where)
    names = rule.models or tuple(recipe.models)
    return Step(method, names, method.complete(rule.parameters, names, where, has_base=recipe.base is not None))


def merge(recipe: Recipe, pool: Pool, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors one after another, in float32 arithmetic and rounded once to `dtypes`.

    Raises:
        CandidateError: a tensor came out with NaN or infinity.
    """
    for info, step in plan(recipe, pool):
        base = pool.base.tensors[info.name].float() if recipe.base is not None else None
        parents = [pool.models[name].tensors[info.name].float() for name in step.models]
        keys = [methods.mask_key(recipe.seed, name, info.name) for name in step.models] if step.method.random else None
        merged = step.method(base, parents, step.parameters, keys).to(dtypes[info.name])
        if not torch.isfinite(merged).all():
            raise CandidateError(f"{step.method.name} made NaN or infinity in {info.name}")
        yield info.name, merged


class Engine:
    """One live model that stays loaded and takes on candidate after candidate in place.

    Args:
        pool: the aligned parents.
        dtype: the dtype of the candidates, a recipe's `out_dtype`.
    """

    def __init__(self, pool: Pool, dtype: str):
        self.pool = pool
        self.dtype = dtype
        self.model: nn.Module = pool.new_model(DTYPES[dtype])
        self._live = floating_tensors(self.model)

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
        dtypes = {name: tensor.dtype for name, tensor in self._live.items()}
        for name, merged in merge(recipe, self.pool, dtypes):
            self._live[name].copy_(merged)
        return time.perf_counter() - started
