"""What the methods that decompose matrices share: changes in float64, singular triples, polar factors.

Decompositions are done on the CPU in float64, whatever is merged where, so that a recipe gives the same bytes on every
device; what they give is rounded once to the tensors' own dtype, which is what is kept of it. Degenerate values are
fixed: directions below the numerical rank are left out, since they are noise that a flattened spectrum would scale up,
and of each pair of singular vectors the left one's largest entry is positive.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Scalars, per_model
from mergesearch.methods.registry import Parameter
from mergesearch.methods.task_vector import merge_linear, task_vectors

# a singular value below this share of the largest, times the longer side, is noise of float32 weights
NOISE = 2.0**-23
# rows of a triangle's blocks that are inverted, and of a matrix that LAPACK factors at once
_BLOCK, _FACTORED_WHOLE = 72, 768

Embeddings = Annotated[
    bool, Parameter(kind="bool", meaning="decompose embeddings, heads and routers too, which are averaged otherwise")
]
Triples = tuple[Tensor, Tensor, Tensor]

_extent: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar("extent", default=None)


@contextlib.contextmanager
def standing_for(shape: tuple[int, int]) -> Iterator[None]:
    """Within it, in this thread, the matrices at hand stand for larger ones of that shape, which are these between
    orthonormal sides: what hangs on a matrix's size goes by `extent`."""
    token = _extent.set(shape)
    try:
        yield
    finally:
        _extent.reset(token)


def extent(matrix: Tensor) -> tuple[int, int]:
    """The shape of a matrix, or of the one that it stands for."""
    return _extent.get() or (matrix.shape[0], matrix.shape[1])


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is decomposed: two dimensions, both longer than 1."""
    return tensor.ndim == 2 and min(tensor.shape) > 1


def averaged(base: Tensor, models: Sequence[Tensor], weight: Scalars, lam: float | Tensor) -> Tensor:
    """base + lambda sum_i w_i d_i / sum_i w_i: what the papers do to norms and biases."""
    return merge_linear(base, task_vectors(base, models), weight, lam, True)


def numbers(weight: Scalars, models: Sequence[Tensor]) -> list[float]:
    """Each model's weight as a Python number."""
    return [float(w) for w in per_model(weight, models)]


def change(base: Tensor, model: Tensor) -> Tensor:
    """model - base, in float64 on the CPU."""
    return (model.double() - base.double()).cpu().contiguous()


def put_back(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta, rounded once to the base's dtype; delta is float64, on any device."""
    return (base.double() + delta.to(base.device)).to(base.dtype)


def like(base: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
    """Results of a decomposition as they are kept: in the base's dtype, on its device."""
    return tuple(r.to(base.device, base.dtype).contiguous() for r in results)


def wide(*kept: Tensor) -> tuple[Tensor, ...]:
    """What was kept, in float64."""
    return tuple(k.double() for k in kept)


def triples(matrix: Tensor, of: Tensor | None = None) -> Triples:
    """The singular triples of a float64 matrix within its numerical rank: U (out, r), S (r,), V^T (r, in).

    Left out is what is no larger than max(out, in) 2^-23 times the largest; of a part of a matrix, times the length of
    `of`, the whole. Where the matrix has a NaN or an infinity all three are NaN, of rank 1.
    """
    if not bool(matrix.isfinite().all()):
        return matrix[:, :1] * torch.nan, matrix[0, :1] * torch.nan, matrix[:1] * torch.nan
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > max(extent(matrix)) * NOISE * (s[:1] if of is None else of.norm())
    u, s, v = u[:, kept], s[kept], v[kept]
    turned = signs(u)
    return u * turned, s, v * turned[:, None]


def first(parts: Triples, count: int) -> Triples:
    """The leading triples, as many as there are up to `count`."""
    u, s, v = parts
    return u[:, :count], s[:count], v[:count]


def signs(columns: Tensor) -> Tensor:
    """+1 or -1 for each column: the sign of its largest entry by magnitude, the first of equal ones."""
    largest = columns.abs().argmax(0, keepdim=True) if columns.shape[1] else columns[:0].long()
    found = columns.gather(0, largest)[0] if columns.shape[1] else columns.new_zeros(0)
    return torch.where(found < 0, -1.0, 1.0).to(columns.dtype)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where there are fewer): U V^T, within the numerical rank."""
    u, _, v = triples(matrix)
    return u @ v


def spectral(base: Tensor, u: Tensor, s: Tensor, v: Tensor, lam: float | Tensor) -> Tensor:
    """base + lambda U diag(S) V^T, from float64 factors."""
    return put_back(base, (u * (s * float(lam))) @ v)


def within_rank(d: Tensor) -> Tensor:
    """d without what lies below its numerical rank, see `triples`; d itself where it has full rank.

    By the eigenvalues of the smaller Gram matrix: an adapter's change, taken from float32 weights, is full of rounding
    errors that an inverse would scale up.
    """
    if not bool(d.isfinite().all()):
        return d
    tall = d.shape[0] > d.shape[1]
    values, vectors = torch.linalg.eigh(d.T @ d if tall else d @ d.T)
    kept = values > (max(extent(d)) * NOISE) ** 2 * values[-1]
    if bool(kept.all()):
        return d
    basis = vectors[:, kept]
    return (d @ basis) @ basis.T if tall else basis @ (basis.T @ d)


def side_by_side(parts: Sequence[Triples]) -> Triples:
    """The triples of several matrices as those of one: U (out, sum r), S (sum r,), V^T (sum r, in)."""
    u, s, v = zip(*parts, strict=True)
    return torch.cat(u, 1), torch.cat(s), torch.cat(v)


def times_inverse(left: Tensor, gram: Tensor) -> Tensor:
    """left gram^(-1), by Cholesky; both float64, and both may be overwritten. NaN where gram is not positive definite.

    left: (out, n), gram: (n, n), symmetric; returns (out, n).
    """
    if gram.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(gram)
        return torch.cholesky_solve(left.T, torch.where(failed > 0, torch.nan, factor)).T
    lower = _factored(gram)
    lower.divide(left, turned=True)
    lower.divide(left, turned=False)
    return left


class _Lower:
    """A lower triangle in halves, down to blocks whose inverses are known, so that to divide by it is to multiply.

    LAPACK's triangular solves reach half of the speed of products on some processors.
    """

    def __init__(self, matrix: Tensor, parts: tuple[_Lower, _Lower] | None = None):
        self.matrix = matrix
        self.half: int = _half(len(matrix))
        self.parts: tuple[_Lower, _Lower] | None = parts
        if parts is None and len(matrix) > _BLOCK:
            self.parts = (_Lower(matrix[: self.half, : self.half]), _Lower(matrix[self.half :, self.half :]))
        if self.parts is None:
            one = torch.eye(len(matrix), dtype=matrix.dtype)
            self.inverse: Tensor = torch.linalg.solve_triangular(matrix, one, upper=False)

    def divide(self, left: Tensor, turned: bool) -> Tensor:
        """left L^(-T) where `turned`, else left L^(-1), in the place of left, (out, n)."""
        if self.parts is None:
            return left.copy_(left @ (self.inverse.T if turned else self.inverse))
        below, first, second = self.matrix[self.half :, : self.half], left[:, : self.half], left[:, self.half :]
        if turned:
            second.addmm_(self.parts[0].divide(first, turned), below.T, alpha=-1)
            self.parts[1].divide(second, turned)
        else:
            first.addmm_(self.parts[1].divide(second, turned), below, alpha=-1)
            self.parts[0].divide(first, turned)
        return left


def _factored(gram: Tensor) -> _Lower:
    """The Cholesky factor, in the place of gram; NaN where there is none."""
    if len(gram) <= _FACTORED_WHOLE:
        factor, failed = torch.linalg.cholesky_ex(gram)
        return _Lower(gram.copy_(factor * torch.nan if failed else factor))
    half = _half(len(gram))
    first = _factored(gram[:half, :half])
    below = first.divide(gram[half:, :half], turned=True)
    gram[half:, half:].addmm_(below, below.T, alpha=-1)
    return _Lower(gram, (first, _factored(gram[half:, half:])))


def _half(length: int) -> int:
    """About half of a length, in whole blocks."""
    return (length // 2 + _BLOCK - 1) // _BLOCK * _BLOCK
