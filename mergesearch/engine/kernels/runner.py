"""Candidates through elementwise kernels, with what the parents have in common kept between them.

What a candidate costs in Python does not grow with its tensors' elements: the recording of a method is kept, statistics
come stacked for all tensors of a shape, and one launch makes every tensor that shares a program.

A tensor's bytes do not depend on which others are made with it (law 1):

- statistics are asked for tensor by tensor, each over its own pieces in their own order (parent_statistics.py);
- the numbers that follow from them are worked out for many tensors at once only where every operation is rounded to the
  nearest, so that an element's result cannot depend on its neighbours; a sine or a sum of a few is done for each tensor
  alone (recording.py);
- a kernel does the same operations for each element, whichever span, block or thread it falls to (code.py).

So grouped and single launches are equal bit for bit, on the CPU and on a CUDA device alike. Between the two devices
masks and elementwise arithmetic are equal bit for bit; sums over a tensor are added up in float64 in each device's own
order, so that a coefficient made of them may differ in its last bit, and with it an element by one unit in the last
place. There law 1 is kept by merging for the export on the device that the candidate was scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergesearch.engine.kernels.compiled import Compiler
from mergesearch.engine.kernels.decompositions import Decompositions, each_on_one_thread
from mergesearch.engine.kernels.double_buffer import DoubleBuffer, by_tensor
from mergesearch.engine.kernels.exact import exact_division
from mergesearch.engine.kernels.factored import coefficients, is_factored, merged, whole
from mergesearch.engine.kernels.joint import has_joint_form
from mergesearch.engine.kernels.joint import merged as merged_jointly
from mergesearch.engine.kernels.launch import AlikeMerges, Kernel, Launch, MergeSet, TensorMerge
from mergesearch.engine.kernels.operands import Operands
from mergesearch.engine.kernels.parent_statistics import Statistics
from mergesearch.engine.kernels.program import BLOCK, WINDOW, Program, cut, spans
from mergesearch.engine.kernels.recording import MethodCall, Place, Recording, Recordings, Values
from mergesearch.engine.kernels.symbols import Unsupported, numbers
from mergesearch.errors import CandidateError
from mergesearch.methods.listening import Listener, listening
from mergesearch.methods.matrices import is_matrix
from mergesearch.methods.parts import MethodPart

# elements of a block on a CUDA device
DEVICE_BLOCK = 2**24
# tables of pointers that a set of merges keeps, one for each program that its groups came up with
_LAUNCHES = 32


@dataclass
class _Share:
    """A candidate's share that is merged alike: the merges, how, and the numbers of this candidate."""

    alike: AlikeMerges
    recording: Recording
    values: Values
    elements: list[list[Tensor]]

    @property
    def tensors(self) -> list[list[Tensor]]:
        """For each merge the result and the program's arguments."""
        which = self.recording.program.parents
        return [
            [merge.out, *merge.operands.parents(which), *elements]
            for merge, elements in zip(self.alike.merges, self.elements, strict=True)
        ]


class Runner:
    """Makes tensors by elementwise kernels where a method allows it, and by its plain definition elsewhere.

    Args:
        statistics: what is kept between candidates.
        compiler: where compiled kernels come from.
        block: elements of a block where there is no compiled kernel.
        decompositions: what is kept of the parents' matrices; in memory alone, if it is not given.
    """

    def __init__(
        self,
        statistics: Statistics,
        compiler: Compiler,
        block: int = BLOCK,
        decompositions: Decompositions | None = None,
    ):
        self.statistics = statistics
        self.compiler = compiler
        self.block = block
        self.recordings: Recordings = Recordings(statistics)
        self.decompositions: Decompositions = decompositions or Decompositions(statistics.elements.limit)
        self._buffers: dict[torch.device, DoubleBuffer] = {}

    @torch.no_grad()
    def run(self, call: MethodCall, merges: Sequence[TensorMerge] | MergeSet) -> None:
        """Writes every merge's tensor.

        Args:
            merges: the tensors; as a `MergeSet` that is kept, what does not change between candidates is not done
                again.

        Raises:
            CandidateError: a tensor came out with NaN or infinity; those before and after it may be written.
        """
        merge_set = merges if isinstance(merges, MergeSet) else MergeSet(merges)
        check_finite(call.method.name, self._made(call, merge_set))

    def _made(self, call: MethodCall, merge_set: MergeSet) -> list[tuple[list[TensorMerge], Tensor]]:
        """Writes every merge's tensor; which of them are not finite."""
        given = numbers(call.method, call.parameters)
        flags: list[tuple[list[TensorMerge], Tensor]] = []
        together: dict[Any, tuple[Kernel, list[_Share]]] = {}
        matrices: list[TensorMerge] = []
        for alike in merge_set.groups:
            if is_factored(alike.operands[0]):
                flags.append((alike.merges, torch.stack(self._factored(call, alike.merges))))
                continue
            try:
                share = self._share(call, alike, given)
            except Unsupported:
                if call.method.matrices:
                    matrices += alike.merges
                    continue
                flags.append((alike.merges, torch.stack([plain(call, merge) for merge in alike.merges])))
                continue
            key, kernel = self._launched_with(share)
            if kernel is None:
                flags.append((alike.merges, torch.stack([self._one(share, i) for i in range(len(alike.merges))])))
            elif alike.out.device.type == "cpu" or key[-1]:
                together.setdefault(key, (kernel, []))[1].append(share)
            else:  # at once: the device works while the next group is prepared
                flags.append((alike.merges, self._launch(merge_set, key, kernel, [share])))
        for key, (kernel, shares) in together.items():
            all_merges = [merge for share in shares for merge in share.alike.merges]
            flags.append((all_merges, self._launch(merge_set, key, kernel, shares)))
        if matrices:
            flags.append((matrices, torch.stack(self._decomposed(call, matrices))))
        return flags

    def _factored(self, call: MethodCall, merges: list[TensorMerge]) -> list[Tensor]:
        """Makes tensors of adapters' factors: their sum where the method is affine, in the space that they share where
        it is the same there, else each after they are expanded; which are not finite (0-d each)."""
        affine = coefficients(call.method, call.parameters, len(merges[0].operands.models))
        if affine is not None:
            return each_on_one_thread(lambda number: merged(merges[number], *affine).cpu(), len(merges))
        if has_joint_form(call, merges[0].operands):
            return each_on_one_thread(lambda number: merged_jointly(call, merges[number]).cpu(), len(merges))
        for merge in merges:
            self.run(call, [TensorMerge(whole(merge.operands), merge.out, merge.label)])
        return [torch.zeros((), dtype=torch.bool)] * len(merges)

    def _decomposed(self, call: MethodCall, merges: list[TensorMerge]) -> list[Tensor]:
        """Makes tensors by a method that decomposes them, the largest first; which are not finite (0-d each)."""
        merges.sort(key=lambda merge: -merge.out.numel())

        def make(number: int) -> Tensor:
            merge = merges[number]
            return plain(call, merge, self.decompositions.listener(merge.operands, self._part)).cpu()

        return each_on_one_thread(make, len(merges))

    def _part(
        self, part: MethodPart, models: Sequence[Tensor], named: Mapping[str, Any], names: Sequence[Any]
    ) -> Tensor:
        """What a part of a method gives, made as a tensor of a candidate is; what is not finite in it shows in what
        the method makes of it."""
        stated = {key: named.get(p.name, p.default) for key, p in part.method.parameters.items()}
        out = torch.empty(models[0].shape, dtype=torch.float64, device=models[0].device)
        operands = Operands(None, tuple(models), ("none", *names), tuple(named.get("keys", ())))
        with listening(None):
            self._made(MethodCall(part.method, stated), MergeSet([TensorMerge(operands, out, part.name)]))
        return out

    def _share(self, call: MethodCall, alike: AlikeMerges, given: Mapping[Place, float]) -> _Share:
        if alike.operands[0].models[0].numel() == 0:
            raise Unsupported("there is nothing to merge")
        if call.method.data is not None or (call.method.matrices and is_matrix(alike.out)):
            raise Unsupported("a decomposition, or statistics of documents")
        recording = self.recordings.get(call, alike.operands[0], given)
        values = Values(recording, given, alike.operands, self.statistics, alike.token)
        return _Share(alike, recording, values, values.elements(recording.elements))

    # --- many tensors in one launch ---

    def _launched_with(self, share: _Share) -> tuple[Any, Kernel | None]:
        """What shares have in common that are made in one launch, and the kernel; None where there is none for them."""
        program, alike = share.recording.program, share.alike
        if not alike.whole or program.rows:
            return None, None
        tensors = [*alike.operands[0].parents(program.parents), *share.elements[0]]
        dtypes, out = tuple(t.dtype for t in tensors), alike.out
        homes = {t.device for t in tensors} - {out.device}
        if homes and (out.device.type != "cuda" or homes != {torch.device("cpu")}):
            return None, None
        kernel = self.compiler.kernel(program, out.dtype, dtypes, out.device)
        return (program.source, out.dtype, out.device, dtypes, bool(homes)), kernel

    def _launch(self, merge_set: MergeSet, key: Any, kernel: Kernel, shares: Sequence[_Share]) -> Tensor:
        """Makes the shares' tensors; which of them are not finite, (tensors,) bool."""
        _, _, device, _, elsewhere = key
        program = shares[0].recording.program
        tensors = [one for share in shares for one in share.tensors]
        masks = [one.masks for share in shares for one in share.alike.operands]
        scalars = _joined(shares)
        if elsewhere:
            buffer = self._buffers.setdefault(device, DoubleBuffer(device))
            return buffer.run(kernel, program, tensors, masks, scalars)
        place = (key, tuple(share.alike.token for share in shares))
        launch = merge_set.launches.get(place)
        if launch is None:
            while len(merge_set.launches) > _LAUNCHES:
                merge_set.launches.pop(next(iter(merge_set.launches)))
            sizes = [one[0].numel() for one in tensors]
            launch = merge_set.launches[place] = Launch(sizes, masks, program, kernel.chunk, device)
        launch.set(tensors, scalars)
        return by_tensor(kernel(launch), launch.owners, len(tensors))

    # --- tensor by tensor ---

    def _one(self, share: _Share, number: int) -> Tensor:
        """Makes one tensor block by block; whether it is not finite (0-d)."""
        program, merge = share.recording.program, share.alike.merges[number]
        device = merge.out.device
        tensors = [t.to(device) for t in share.tensors[number][1:]]
        rows = [r.to(device) for r in share.values.rows[number]]
        scalars = share.values.scalars[min(number, len(share.values.scalars) - 1)].to(device)
        out = merge.out if merge.out.ndim else merge.out.reshape(1)
        tensors = [t if t.ndim else t.reshape(1) for t in tensors]
        if all(t.is_contiguous() for t in (out, *tensors)) and not program.rows:
            out, tensors = out.view(-1), [t.view(-1) for t in tensors]
        length, inner = out.shape[0], max(1, out.shape[1:].numel())
        size = self.block if device.type == "cpu" else max(self.block, DEVICE_BLOCK)
        flags = []
        for window, end in spans(out.shape, True, WINDOW) if out.ndim == 1 else [(0, length)]:
            for start, stop in spans(out[window:end].shape, out.ndim == 1, size):
                start, stop = window + start, window + stop
                keys = _keys(program, merge.operands, start * inner, device)
                pieces = [cut(t, start, stop, length) for t in (*tensors, *rows)]
                with exact_division(device):
                    flags.append(program.kernel(out[start:stop], scalars, keys, *pieces))
        return ~torch.stack(flags).all()


def _keys(program: Program, operands: Operands, offset: int, device: torch.device) -> Tensor:
    return torch.tensor(program.keys(operands.masks, offset), dtype=torch.int32, device=device)


def _joined(shares: Sequence[_Share]) -> Tensor:
    """The scalars of all shares' tensors, one row for all where they are alike."""
    scalars = [share.values.scalars for share in shares]
    if all(len(s) == 1 and torch.equal(s, scalars[0]) for s in scalars):
        return scalars[0]
    return torch.cat([s.expand(len(share.alike.merges), -1) for s, share in zip(scalars, shares, strict=True)])


def plain(call: MethodCall, merge: TensorMerge, kept: Callable[..., Listener] | None = None) -> Tensor:
    """The method's plain definition over the whole tensor; whether the result is not finite (0-d).

    Args:
        kept: gives what answers the method's decompositions, from the base's and the models' tensors.
    """
    base, models = merge.operands.base, merge.operands.models
    device = merge.out.device
    start = None if base is None else base.to(device).float()
    others = [m.to(device).float() for m in models]
    read = merge.operands.statistics
    given = None if read is None else read()
    masks = list(merge.operands.masks) or None
    with exact_division(device), listening(kept(start, others) if kept else None):
        result = call.method(start, others, call.parameters, masks, given).to(merge.out.dtype)
    merge.out.copy_(result)
    return not_finite(result)


def not_finite(tensor: Tensor) -> Tensor:
    """Whether a tensor has a NaN or an infinity (0-d), by its least and greatest element: a NaN is both."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    return ~torch.isfinite(torch.stack(torch.aminmax(tensor))).all()


def check_finite(method: str, flags: Sequence[tuple[list[TensorMerge], Tensor]]) -> None:
    """`CandidateError` where one of the flags (true: not finite) is true; the devices are waited for once."""
    on_cpu = [bad.to("cpu", non_blocking=True) for _, bad in flags]
    for device in {bad.device for _, bad in flags if bad.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    for (merges, _), bad in zip(flags, on_cpu, strict=True):
        if bad.any():
            raise CandidateError(f"{method} made NaN or infinity in {merges[int(bad.nonzero()[0])].label}")
