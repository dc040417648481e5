"""Methods on each task vector's own singular triples: TSV-M, STAR and ResMerge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Normalize, Scalar, Weights
from mergesearch.methods.listening import statistic
from mergesearch.methods.matrices import (
    NOISE,
    Embeddings,
    Triples,
    averaged,
    change,
    extent,
    first,
    is_matrix,
    like,
    numbers,
    polar,
    put_back,
    side_by_side,
    spectral,
    triples,
    wide,
)
from mergesearch.methods.registry import Parameter, method
from mergesearch.methods.task_vector import Lambda

RankShare = Annotated[
    Scalar,
    Parameter(
        low=0.0, high=1.0, meaning="the share of each model's singular directions that is kept; 0: one part in T models"
    ),
]
Energy = Annotated[
    Scalar,
    Parameter(
        low=0.0,
        high=1.0,
        low_open=True,
        search=(0.2, 0.8),
        meaning="the share of the nuclear norm that the directions kept must hold",
    ),
]
HeadShare = Annotated[
    Scalar, Parameter(low=0.0, search=(0.0, 1.0), meaning="how much of the shared rank-1 direction is added")
]
Sharpness = Annotated[
    Scalar,
    Parameter(low=0.0, high=1.0, search=(0.3, 1.0), meaning="the exponent of the agreement where all models agree"),
]
# shares of the nuclear norm for which STAR's triples are kept: the least that is enough
_TIERS = (0.5, 0.8, 1.0)


@method(paper="Gargiulo et al. 2024, arXiv:2412.00081", family="task_vector", base="required", matrices=True)
def tsv(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    rank: RankShare = 0.0,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """Keep each task vector's leading singular directions, make those of all models orthonormal, add them up.

    The k = max(1, floor(rank min(out, in))) leading triples (U_i, S_i, V_i) of each d_i, side by side; base + lambda
    polar([U_1 .. U_T]) diag(w_i S_i) polar([V_1 .. V_T])^T, polar(X) = X (X^T X)^(-1/2). What is no matrix is averaged.
    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging" (TSV-M), arXiv:2412.00081.

    weight: any number for each model, 1. rank: [0, 1], 0 (1/T). lambda: any number, 1. embeddings: decompose them too,
    false. base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    u, s, v, owner = wide(*tsv_sides(base, models, float(rank)))
    weights = torch.tensor(numbers(weight, models), dtype=s.dtype, device=s.device)
    return spectral(base, u, s * weights[owner.long()], v, lam)


@statistic(how="matrix")
def tsv_sides(base: Tensor, models: Sequence[Tensor], rank: float) -> tuple[Tensor, ...]:
    """Both orthonormal sides, the singular values between them and whose they are: (out, K), (K,), (K, in), (K,)."""
    count = max(1, int(min(extent(base)) * (rank or 1 / len(models)) + 1e-9))
    parts = [first(triples(change(base, model)), count) for model in models]
    u, s, v = side_by_side(parts)
    owner = torch.cat([torch.full_like(part[1], float(i)) for i, part in enumerate(parts)])
    return like(base, polar(u), s, polar(v), owner)


@method(paper="Lee et al. 2025, arXiv:2502.10339", family="task_vector", base="required", matrices=True)
def star(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    eta: Energy = 0.4,
    lam: Lambda = 1.0,
    normalize: Normalize = True,
    embeddings: Embeddings = False,
) -> Tensor:
    """Cut each task vector to its leading singular directions, rescale it to its nuclear norm, average.

    r_i the least rank with sum_{j <= r} S_ij >= eta sum_j S_ij; d_i <- (sum_j S_ij / sum_{j <= r} S_ij) times its r_i
    leading triples; base + lambda sum_i w_i d_i / sum_i w_i. What is no matrix is averaged. Lee et al., "STAR:
    Spectral Truncation and Rescale for Model Merging", arXiv:2502.10339.

    weight: any number for each model, 1. eta: (0, 1], 0.4. lambda: any number, 1. normalize: divide by the sum of the
    weights, true. embeddings: decompose them too, false. base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    tier = next(t for t in _TIERS if t >= float(eta))
    weights = numbers(weight, models)
    divisor = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
    kept = [wide(*leading(base, model, tier)) for model in models]
    cut = [_cut(u, s, v, float(eta), w / divisor) for (u, s, v), w in zip(kept, weights, strict=True)]
    u, s, v = side_by_side(cut)
    return spectral(base, u, s, v, lam)


def _cut(u: Tensor, s: Tensor, v: Tensor, eta: float, weight: float) -> Triples:
    rank = _rank(s, eta)
    return u[:, :rank], s[:rank] * (weight * s.sum() / s[:rank].sum()), v[:rank]


def _rank(s: Tensor, share: float) -> int:
    """The least number of leading singular values that hold a share of their sum."""
    if len(s) == 0:
        return 0
    short = s.cumsum(0) < share * s.sum() * (1 - 1e-12)
    return min(len(s), int(short.sum()) + 1)


@statistic(how="matrix")
def leading(base: Tensor, model: Tensor, share: float) -> tuple[Tensor, ...]:
    """The leading singular vectors that hold a share of d's nuclear norm, and all singular values: U, S, V^T."""
    u, s, v = triples(change(base, model))
    # one more: the sums are taken again of rounded values
    rank = min(len(s), _rank(s, share) + 1)
    return like(base, u[:, :rank], s, v[:rank])


@method(paper="Sun et al. 2026, arXiv:2606.02252", family="task_vector", base="required", matrices=True)
def resmerge(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    weight: Weights = 1.0,
    sharpness: Sharpness = 0.7,
    head: HeadShare = 0.2,
    lam: Lambda = 1.0,
    embeddings: Embeddings = False,
) -> Tensor:
    """Split each task vector into its rank-1 head and the rest; go the way of the rests, as far as they agree.

    d_i = H_i + R_i, H_i the leading singular triple. q the unit sum of w_i R_i / |R_i|; c the mean cosine of R_i and q,
    s that of all pairs; g = mean((s + 1)/2, (c + 1)/2), b = 1 - (1 - sharpness) g; A = c^b mean_i(w_i |R_i|) q;
    C = head p |A| times the unit sum of w_i H_i, p the mean of the heads' positive cosines; base + lambda (A + C).
    Where c <= 1/sqrt(T), and what is no matrix: the average. For parents trained by reinforcement, whose task vectors
    hardly overlap. Sun et al., "ResMerge", arXiv:2606.02252.

    weight: any number for each model, 1. sharpness: [0, 1], 0.7. head: [0, inf), 0.2. lambda: any number, 1.
    embeddings: decompose them too, false. base and each model: one shape; returns that shape.
    """
    if not is_matrix(base):
        return averaged(base, models, weight, lam)
    u, s, v, gram_rest, gram_head = wide(*heads(base, models))
    weights = torch.tensor(numbers(weight, models), dtype=torch.float64)
    mix = _residual_mix(gram_rest.cpu(), gram_head.cpu(), weights, float(sharpness), float(head))
    if mix is None:
        return averaged(base, models, weight, lam)
    whole, rank1 = mix
    # sum_i a_i R_i + b_i H_i = sum_i a_i d_i + (b_i - a_i) H_i
    delta = torch.zeros_like(base, dtype=torch.float64)
    for model, a in zip(models, whole.tolist(), strict=True):
        delta = delta + (model.double() - base.double()) * a
    delta = delta + (u * (s * (rank1 - whole).to(s.device))) @ v
    return put_back(base, delta * float(lam))


@statistic(how="matrix")
def heads(base: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The leading triples of all d_i, (out, T), (T,), (T, in), and the products of all rests and all heads, (T, T)."""
    changes = [change(base, model) for model in models]
    tops = [_head(d) for d in changes]
    # as they are kept, so that the rests are what is left of d_i beside the heads that are used
    u, s, v = like(base, *side_by_side(tops))
    kept = (u, s, v)
    u, s, v = (k.double().cpu() for k in kept)
    rests = torch.stack([(d - s[i] * torch.outer(u[:, i], v[i])).flatten() for i, d in enumerate(changes)])
    # what is left of a rank-1 change is noise, and has no direction to go by
    noise = s * (max(extent(base)) * NOISE)
    rests = torch.where((rests.norm(dim=1) <= noise)[:, None], 0.0, rests)
    gram_head = s[:, None] * s * (u.T @ u) * (v @ v.T)
    return (*kept, (rests @ rests.T).to(base.device), gram_head.to(base.device))


def _head(d: Tensor) -> Triples:
    """The leading singular triple by the smaller Gram matrix; s is 0 where d is 0, all is NaN where d is not finite."""
    if not bool(d.isfinite().all()):
        return triples(d)
    tall = d.shape[0] > d.shape[1]
    side = torch.linalg.eigh(d.T @ d if tall else d @ d.T).eigenvectors[:, -1]
    side = side * torch.where(side[side.abs().argmax()] < 0, -1.0, 1.0)
    other = d @ side if tall else d.T @ side
    s = other.norm()
    other = other / torch.where(s == 0, 1.0, s)
    u, v = (other, side) if tall else (side, other)
    return u[:, None], s[None], v[None]


def _residual_mix(
    rest: Tensor, head: Tensor, weights: Tensor, sharpness: float, share: float
) -> tuple[Tensor, Tensor] | None:
    """The coefficients of the rests and of the heads, (T,) each; None where the models do not agree."""
    count = len(weights)
    length = rest.diagonal().clamp(min=0).sqrt()
    unit = torch.where(length > 0, weights / torch.where(length > 0, length, 1.0), 0.0)
    sum_length = (unit @ rest @ unit).clamp(min=0).sqrt()
    if not bool(sum_length > 0):
        return None
    q = unit / sum_length
    c = _cosines(rest @ q, length).mean()
    pairs = _pairs(rest)
    s = pairs.mean()
    if count == 1 or bool(c <= count**-0.5):
        return None
    agreement = ((s + 1) / 2 + (c + 1) / 2) / 2
    size = c.clamp(min=0) ** (1 - (1 - sharpness) * agreement) * (weights * length).mean()
    shared = _pairs(head).clamp(min=0)
    positive = shared[shared > 0].mean() if bool((shared > 0).any()) else torch.zeros((), dtype=rest.dtype)
    head_length = (weights @ head @ weights).clamp(min=0).sqrt()
    heads_share = weights / torch.where(head_length > 0, head_length, 1.0) * (share * positive * size.abs())
    return q * size, heads_share


def _cosines(products: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, products / torch.where(lengths > 0, lengths, 1.0), 0.0)


def _pairs(products: Tensor) -> Tensor:
    """The cosines of all pairs of different models, 0 where one is 0."""
    lengths = products.diagonal().clamp(min=0).sqrt()
    both = lengths[:, None] * lengths
    cosines = torch.where(both > 0, products / torch.where(both > 0, both, 1.0), 0.0)
    rows, columns = torch.triu_indices(len(products), len(products), 1)
    return cosines[rows, columns]
