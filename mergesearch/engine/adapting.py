"""A recipe's candidate as an adapter over its base: exact where the change's rank allows it, the nearest one else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesearch.checkpoints import Pool
from mergesearch.checkpoints.adapters import Adapter, factors_of, holders, joint_rank
from mergesearch.engine.kernels.decompositions import each_on_one_thread
from mergesearch.engine.plan import Job, merge, plan
from mergesearch.errors import UserError
from mergesearch.recipe import BASE, Recipe

# the rank where neither the user nor the adapters of the pool say one
_RANK = 64
# a loss below this share of the change is the rounding of float32 weights
EXACT = 1e-4


@dataclass(frozen=True)
class Adapted:
    """An adapter, and how near it is to the candidate.

    Attributes:
        rank: the largest rank that was allowed.
        loss: the length of what is missing of the change, as a share of the change's length.
        worst: the tensor of which the largest share is missing, and that share.
    """

    adapter: Adapter
    rank: int
    loss: float
    worst: tuple[str, float]

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding is missing."""
        return self.loss < EXACT

    def __str__(self) -> str:
        ranks = self.adapter.ranks
        held = f"{len(ranks)} linear layers, ranks {min(ranks)} to {max(ranks)}" if ranks else "no linear layer"
        whole = f", {len(self.adapter.saved)} other layers whole" if self.adapter.saved else ""
        if self.exact:
            return f"{held}{whole}: all of the change (to {self.loss:.1e} of its length)"
        return (
            f"{held}{whole}: {self.loss:.1%} of the change is missing by length, most in {self.worst[0]} "
            f"({self.worst[1]:.1%}); a larger --rank keeps more"
        )


@torch.no_grad()
def adapted(recipe: Recipe, pool: Pool, rank: int | None = None) -> Adapted:
    """The adapter of a recipe's candidate; the candidate's tensors are those of the plain definition, unrounded.

    Args:
        rank: the largest of a layer; None for the sum of the ranks of the pool's adapters, 64 where a model is none.

    Raises:
        UserError: a candidate that is no change of the base's own layers, or changes what an adapter cannot hold.
        CandidateError: the merge came out with NaN or infinity.
    """
    if recipe.stack is not None or recipe.tokenizer != BASE or recipe.base is None:
        raise UserError(
            "a stack, another tokenizer or a merge without a base cannot be an adapter: use --format checkpoint"
        )
    jobs, held = plan(recipe, pool), holders(pool)
    most = rank or joint_rank(pool) or _RANK
    dtypes = dict.fromkeys(pool.base.live, torch.float32)
    adapter = Adapter()

    def work(number: int) -> Any:
        return _held(jobs[number], pool, recipe.seed, dtypes, held, most)

    results = [part for part in each_on_one_thread(work, len(jobs)) if part is not None]
    missing, length, shares = 0.0, 0.0, {"nothing": 0.0}
    for job, how, value, lost, whole in results:
        layer, own = job.piece.live.rpartition(".")[::2]
        if how == "saved":
            adapter.saved.setdefault(layer, {})[own] = value
        else:
            adapter.factors[layer] = value
            adapter.turned = adapter.turned or how == "turned"
        missing, length = missing + lost**2, length + whole**2
        shares[job.info.name] = lost / whole
    for layer, own in adapter.saved.items():
        # a layer that is saved is saved with all that it has
        for name, tensor in pool.base.live.items():
            if name.rpartition(".")[0] == layer:
                own.setdefault(name.rpartition(".")[2], tensor.cpu().float())
    worst = max(shares, key=lambda name: shares[name])
    return Adapted(adapter, most, math.sqrt(missing / length) if length else 0.0, (worst, shares[worst]))


def _held(
    job: Job, pool: Pool, seed: int, dtypes: dict[str, torch.dtype], held: dict[str, tuple[str, str]], most: int
) -> Any:
    """How an adapter holds one tensor: the job, how, what, the length that is missing, that of the change; or None."""
    ((_, merged),) = merge([job], pool, seed, dtypes)
    base = pool.base.tensors[job.info.name]
    change = (merged.double() - base.double()).cpu()
    whole = float(change.norm())
    if whole <= 4 * 2.0**-24 * float(base.double().norm()):  # no more than rounding
        return None
    _, how = held.get(job.piece.live, ("", "not a layer's own weight"))
    if not job.piece.whole or how not in ("factors", "turned", "saved"):
        why = how if job.piece.whole else "a part of a fused tensor"
        raise UserError(
            f"the candidate changes {job.info.name}, {why}, which an adapter cannot hold: use --format checkpoint"
        )
    if how == "saved":
        return job, how, merged.cpu(), 0.0, whole
    change = change.T if how == "turned" else change
    factors, lost = factors_of(change, _noise(change, base, len(job.parents)), most)
    return job, how, factors, lost, whole


def _noise(change: Tensor, base: Tensor, models: int) -> float:
    """The largest singular value, about, of the rounding errors of float32 weights in the candidate and its parents."""
    sides = sum(side**0.5 for side in change.shape)
    return (2 + models) * 2.0**-24 * float(base.double().square().mean().sqrt()) * sides
