"""KnOTS: TIES and DARE-TIES in a basis that all task vectors share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergesearch.methods.common import Normalize, Weights, per_model
from mergesearch.methods.listening import statistic
from mergesearch.methods.masks import MaskKey
from mergesearch.methods.matrices import Embeddings, change, is_matrix, like, put_back, triples
from mergesearch.methods.parts import part
from mergesearch.methods.registry import method
from mergesearch.methods.task_vector import Densities, Lambda, drop, merge_elected, task_vectors, trim


@method(paper="Stoica et al. 2024, arXiv:2410.19735", family="task_vector", base="required", matrices=True)
def knots(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = True,
    embeddings: Embeddings = False,
) -> Tensor:
    """Turn the task vectors into one basis that all of them share, merge them there as ties does, turn back.

    [d_1 .. d_T] = U S [V_1^T .. V_T^T], side by side, within the numerical rank; ties of the S V_i^T; base + lambda U
    times that. What is no matrix is merged by ties as it is. Stoica et al., "Model Merging with SVD to Tie the Knots",
    arXiv:2410.19735; Yadav et al., arXiv:2306.01708.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. lambda: any number, 1. normalize: divide by
    the weights that took part, true. embeddings: decompose them too, false. base and each model: one shape; returns
    that shape.
    """
    stated: dict[str, Any] = {"weight": weight, "density": density, "lam": lam, "normalize": normalize}
    if not is_matrix(base):
        kept = [trim(d, p) for d, p in zip(task_vectors(base, models), per_model(density, models), strict=True)]
        return merge_elected(base, kept, weight, lam, normalize)
    return _turned_back(base, models, trimmed_and_elected, **stated)


@method(paper="Stoica et al. 2024, arXiv:2410.19735", family="task_vector", base="required", matrices=True)
def knots_dare(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
    embeddings: Embeddings = False,
) -> Tensor:
    """Turn the task vectors into one basis that all of them share, merge them there as dare_ties does, turn back.

    As `knots`, with dare_ties of the S V_i^T: elements dropped at random and the others divided by density. What is no
    matrix is merged by dare_ties as it is. Stoica et al., arXiv:2410.19735; Yu et al., arXiv:2311.03099.

    weight: any number for each model, 1. density: (0, 1] for each model, 1. lambda: any number, 1. normalize: divide by
    the weights that took part, false. embeddings: decompose them too, false. keys: one mask key for each model. base
    and each model: one shape; returns that shape.
    """
    stated: dict[str, Any] = {"weight": weight, "density": density, "lam": lam, "normalize": normalize}
    if not is_matrix(base):
        each = zip(task_vectors(base, models), per_model(density, models), keys, strict=True)
        kept = [drop(d, p, "inverse", key, 1) for d, p, key in each]
        return merge_elected(base, kept, weight, lam, normalize)
    return _turned_back(base, models, dropped_and_elected, keys=keys, **stated)


def _turned_back(base: Tensor, models: Sequence[Tensor], merge: Callable[..., Tensor], **stated: Any) -> Tensor:
    u, turned = shared_basis(base, models)
    if not u.shape[1]:
        return base.clone()
    return put_back(base, u.double() @ merge(None, list(turned), **stated))


@part
def trimmed_and_elected(
    base: None,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = True,
) -> Tensor:
    """What ties adds to a base, of task vectors in a basis; float64."""
    # a trim chooses and rounds nothing: in the vectors' own dtype it is the same
    kept = [trim(d, density_i).double() for d, density_i in zip(models, per_model(density, models), strict=True)]
    return merge_elected(torch.zeros_like(kept[0]), kept, weight, lam, normalize)


@part
def dropped_and_elected(
    base: None,
    models: Sequence[Tensor],
    *,
    keys: Sequence[MaskKey],
    weight: Weights = 1.0,
    density: Densities = 1.0,
    lam: Lambda = 1.0,
    normalize: Normalize = False,
) -> Tensor:
    """What dare_ties adds to a base, of task vectors in a basis; float64."""
    each = zip(models, per_model(density, models), keys, strict=True)
    kept = [drop(d.double(), density_i, "inverse", key, 1) for d, density_i, key in each]
    return merge_elected(torch.zeros_like(kept[0]), kept, weight, lam, normalize)


@statistic(how="matrix")
def shared_basis(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The left singular vectors of all d_i side by side, (out, r), and every d_i in that basis, (T, r, in)."""
    changes = [change(base, model) for model in models]
    u, _, _ = triples(torch.cat(changes, 1))
    return like(base, u, torch.stack([u.T @ d for d in changes]))
