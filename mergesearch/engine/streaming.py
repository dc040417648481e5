"""A recipe merged from files to files, tensor by tensor: in the memory of a few tensors, whatever the models' size."""

from __future__ import annotations

import json
import queue
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from mergesearch import disks
from mergesearch.checkpoints import Devices, Form, Pool, check_shard_size, release, save_without_weights, state
from mergesearch.checkpoints.lowrank import LowRank
from mergesearch.engine import kernels
from mergesearch.engine.plan import DTYPES, Job, form_of, plan
from mergesearch.errors import CutError
from mergesearch.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tensors that are merged but not yet written; each is as large as the largest tensor at most
_AHEAD = 1
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def can_stream(recipe: Recipe, pool: Pool) -> bool:
    """Whether the candidate's files hold its live tensors as they are: not so for fused experts."""
    return all(piece.whole and piece.name == piece.live for piece in form_of(recipe, pool).layout.pieces)


@torch.no_grad()
def stream(
    recipe: Recipe,
    pool: Pool,
    folder: Path,
    metadata: Mapping[str, str],
    max_shard_size: str = "5GB",
    compiled: kernels.When | None = None,
) -> None:
    """Writes the recipe's candidate: config, generation config, tokenizer, and safetensors shards.

    The same bytes in the same files as a candidate that was built in memory and saved. While one tensor is merged the
    one before it is written and the next one's pages are read. Load the pool with `residency="mapped"`: then no more
    is held than a few tensors.

    Args:
        recipe: one for which `can_stream` is true.
        pool: the parents.
        folder: an empty folder.
        metadata: goes into the header of each shard.
        max_shard_size: as `5GB`.
        compiled: see `Engine`.

    Raises:
        UserError: the recipe does not fit the pool, or `max_shard_size` is no size.
        CandidateError: the merge came out with NaN or infinity.
        CutError: a parent's file was cut short meanwhile.
        OSError: there is no room for it, which is found before a tensor is merged.
    """
    check_shard_size(max_shard_size)
    form = form_of(recipe, pool)
    jobs = {job.piece.name: job for job in plan(recipe, pool, form)}
    blank = _blank(form, DTYPES[recipe.out_dtype])
    save_without_weights(blank, pool.tokenizer, folder)
    tensors = _in_files(blank)
    disks.need(folder, sum(tensor.nbytes for tensor in tensors.values()))
    runner = kernels.runner_for(pool.parameters, len(pool.models) + 1, torch.device("cpu"), compiled)
    constants = pool.constants_of(form)
    order = [name for names in _shards(tensors, folder, max_shard_size).values() for name in names]
    with _Reading(pool, [jobs[name] for name in order if name in jobs], recipe.seed) as reading, _Writing() as writing:
        for file, names in _shards(tensors, folder, max_shard_size).items():
            writing.begin(file, {name: tensors[name] for name in names}, metadata)
            for name in names:
                if name in jobs:
                    writing.put(_merge(jobs[name], pool, recipe.seed, tensors[name], runner))
                    reading.done()
                else:
                    writing.put(constants[name])
    writing.check()


def _blank(form: Form, dtype: torch.dtype) -> PreTrainedModel:
    """The candidate on the meta device: names, shapes, and the dtype that the architecture keeps each tensor in."""
    meta = torch.device("meta")
    blank = state(form.blueprint.blank())
    empty = {
        n: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device=meta)
        for n, t in blank.items()
    }
    return cast("PreTrainedModel", form.blueprint.build(empty, dtype, Devices(meta)))


def _in_files(blank: PreTrainedModel) -> dict[str, Tensor]:
    """The live tensors in the order in which transformers writes them, which decides what goes into which shard."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(blank, state(blank))


def _shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> dict[Path, list[str]]:
    """Which file holds which tensors; writes the index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if split.is_sharded:
        total = {"total_parameters": sum(t.numel() for t in tensors.values()), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return {folder / file: names for file, names in split.filename_to_tensors.items()}


def _merge(job: Job, pool: Pool, seed: int, blank: Tensor, runner: kernels.Runner) -> Tensor:
    out = torch.empty(blank.shape, dtype=blank.dtype)
    pool.mapped.check()
    operands = job.operands(pool, seed)
    step = job.step
    runner.run(kernels.MethodCall(step.method, step.parameters), [kernels.TensorMerge(operands, out, job.info.name)])
    release(t for t in (operands.base, *operands.models) if t is not None and not isinstance(t, LowRank))
    return out


class _Reading:
    """A thread that reads the parents' pages of the next tensor while this one is merged."""

    def __init__(self, pool: Pool, jobs: Sequence[Job], seed: int):
        self._pool, self._jobs, self._seed = pool, jobs, seed
        self._go = threading.Semaphore(1)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="mergesearch-reading", daemon=True)

    def __enter__(self) -> _Reading:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()

    def done(self) -> None:
        """One more tensor is merged."""
        self._go.release()

    def _run(self) -> None:
        for job in self._jobs[1:]:
            self._go.acquire()
            if self._stopped:
                return
            operands = job.operands(self._pool, self._seed)
            try:
                self._pool.mapped.check()
            except CutError:  # whoever merges the tensor says so
                return
            for tensor in (operands.base, *operands.models):
                if tensor is not None and not isinstance(tensor, LowRank) and tensor.numel() and tensor.is_contiguous():
                    tensor.view(-1).view(torch.uint8)[::4096].sum()


class _Writing:
    """A thread that writes tensors in order, one shard after another."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mergesearch-writing", daemon=True)

    def __enter__(self) -> _Writing:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()

    def begin(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """The next tensors go to `file`, in the order of `tensors`."""
        self.put((file, _header(tensors, metadata)))

    def put(self, item: Any) -> None:
        self.check()
        self._queue.put(item)

    def check(self) -> None:
        """Raises what went wrong while writing."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        file: BinaryIO | None = None
        for item in iter(self._queue.get, None):
            if self._error is not None:
                continue
            try:
                if isinstance(item, tuple):
                    if file is not None:
                        file.close()
                    opened: BinaryIO = item[0].open("wb")
                    opened.write(item[1])
                    file = opened
                elif file is not None:  # a file begins before its tensors
                    for part in _bytes(item):
                        file.write(part)
            except BaseException as error:
                self._error = error
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._error = self._error or error


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file (https://github.com/huggingface/safetensors#format)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    parts: Iterable[Tensor] = flat.split(2**26)
    for part in parts:
        yield part.numpy().data
