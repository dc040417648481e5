"""Methods of matrices on adapters that are not expanded: in the space that all of them share.

Task vectors d_i = s_i B_i A_i have their columns in the span of all B and their rows in that of all A. With orthonormal
bases P and Q of the two, d_i = P C_i Q, C_i no larger than the sum of the ranks. A method that goes by singular values
and products of task vectors gives P (its result for the C_i) Q, since neither changes under orthonormal sides; KnOTS,
whose elements are looked at in the rows, is left its columns: C_i = P^T d_i. What hangs on a matrix's own size (a share
of its rank, a ridge, what counts as noise) goes by the whole matrix's, `methods.matrices.standing_for`.

The result differs from the expanded merge by that one's rounding alone: there every W + s B A is rounded to float32
before W is taken away again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergesearch.checkpoints.lowrank import LowRank
from mergesearch.engine.kernels.launch import TensorMerge
from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.recording import MethodCall
from mergesearch.methods.matrices import is_matrix, standing_for

# what does not change under orthonormal sides, and what does not under those of its columns
_BOTH = ("tsv", "star", "iso", "iso_cts", "regmean_free", "resmerge")
_COLUMNS = ("knots", "knots_dare")


def has_joint_form(call: MethodCall, operands: Operands) -> bool:
    """Whether a method's merge of these tensors is the same in the space that they share, and smaller there."""
    base = operands.base
    if call.method.name not in (*_BOTH, *_COLUMNS) or base is None or not is_matrix(base):
        return False
    if not all(m is base or (isinstance(m, LowRank) and m.start is base) for m in operands.models):
        return False
    rank = sum(m.a.shape[0] for m in operands.models if isinstance(m, LowRank))
    return 1 < rank < min(base.shape)


def merged(call: MethodCall, merge: TensorMerge) -> Tensor:
    """Writes the merge; whether the result is not finite (0-d).

    In memory besides: the factors in float64, their bases, and one matrix of the tensor's size for the sum.
    """
    base, models = merge.operands.base, merge.operands.models
    assert base is not None
    sides = [_sides(m) if isinstance(m, LowRank) else None for m in models]
    p = _orthonormal(torch.cat([left for left, _ in filter(None, sides)], 1))
    both = call.method.name in _BOTH
    q = _orthonormal(torch.cat([right for _, right in filter(None, sides)]).T).T if both else None
    cores = [_core(side, p, q, base.shape[1]) for side in sides]
    with standing_for((base.shape[0], base.shape[1])):
        core = call.method(torch.zeros_like(cores[0]), cores, call.parameters, list(merge.operands.masks) or None)
    change = p @ (core if q is None else core @ q)
    result = (base.to(change.device).double() + change).to(merge.out.dtype)
    merge.out.copy_(result)
    return ~torch.isfinite(result).all()


def _sides(model: LowRank) -> tuple[Tensor, Tensor]:
    """d as (out, r) times (r, in), float64 on the CPU, of the tensor as it lies in the model."""
    b, a = model.b.double().cpu() * model.scale, model.a.double().cpu()
    return (a.T, b.T) if model.turned else (b, a)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis that has the columns in its span."""
    return torch.linalg.qr(columns).Q


def _core(side: tuple[Tensor, Tensor] | None, p: Tensor, q: Tensor | None, inner: int) -> Tensor:
    """P^T d Q^T, or P^T d; 0 where a model leaves the base's tensor alone."""
    if side is None:
        return torch.zeros(p.shape[1], inner if q is None else q.shape[0], dtype=p.dtype)
    left, right = p.T @ side[0], side[1]
    return left @ (right if q is None else right @ q.T)
