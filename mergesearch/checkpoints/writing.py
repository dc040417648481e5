"""Writing what was merged: a complete checkpoint, or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from mergesearch import disks, leftovers
from mergesearch.checkpoints.loading import quiet_transformers, state
from mergesearch.errors import UserError

# files of a checkpoint that transformers writes with a processor, beside those of the tokenizer
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` when all is written and vanishes when anything fails.

    Raises:
        UserError: `out` exists and is not empty, cannot be written, or the disk is full.
    """
    out = Path(out)
    _refuse_taken(out)
    above = _first_missing(out.parent)
    leftovers.clear(out.parent, out.name)
    partial = leftovers.partial(out)
    try:
        with _disk_errors(out):
            partial.mkdir(parents=True)
            yield partial
            if out.exists():
                out.rmdir()
            partial.rename(out)
            above = None
    finally:
        leftovers.discard(partial)
        if above is not None:
            _remove_empty(out.parent, above)


def check_new_folder(out: str | Path) -> None:
    """Refuses what `new_folder` would refuse before anything is written, and makes nothing. For a caller with much to
    do first.

    Raises:
        UserError: `out` exists and is not empty, or no folder can be made there.
    """
    out = Path(out)
    _refuse_taken(out)
    there = next(path for path in out.absolute().parents if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"cannot write {out} ({there} is a file): name a folder that can be written")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out} ({there} is not writable): name a folder that can be written")


def _refuse_taken(out: Path) -> None:
    # os.path.exists is False, not an error, where a folder above may not be entered
    try:
        taken = os.path.exists(out) and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name a folder that can be written") from None
    if taken:
        raise UserError(f"{out} exists already: name a new folder")


def _first_missing(folder: Path) -> Path | None:
    """The topmost of the folders that have to be made to make `folder`."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def _remove_empty(folder: Path, last: Path) -> None:
    with contextlib.suppress(OSError):
        while folder.is_relative_to(last):
            folder.rmdir()
            folder = folder.parent


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(out, (error.strerror or "").partition(": ")[2]) from None
        if not str(error.filename).startswith(str(out.parent)):
            raise  # not about this folder
        raise UserError(f"cannot write {out} ({error.strerror}): name a folder that can be written") from None
    except Exception as error:
        # safetensors and tokenizers give the system's words in an exception of their own, the latter's has no type
        if type(error) not in (SafetensorError, Exception):
            raise
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _full(out) from None
        if "I/O error" in str(error) or "os error" in str(error):
            raise UserError(f"cannot write {out} ({error}): name a folder that can be written") from None
        raise


def _full(out: Path, why: str = "") -> UserError:
    return UserError(
        f"cannot write {out}: the disk is full ({why or 'nothing was kept'}): free space or name a folder elsewhere"
    )


def remove(folder: Path) -> None:
    """Takes a folder that was written here away, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def check_shard_size(size: str) -> None:
    """`UserError` where a text is no size of a file."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*[KMGT]B\s*", size, re.IGNORECASE):
        raise UserError(f"--max-shard-size {size!r} is no size: write it as 5GB or 500MB")


def save(model: Any, tokenizer: Any, folder: Path, metadata: Mapping[str, str], max_shard_size: str = "5GB") -> None:
    """Writes a complete checkpoint: config, generation config, tokenizer, and safetensors shards carrying `metadata`.

    Goes through transformers, so that what the live model holds in another form (fused experts, tied embeddings)
    is written as the architecture's checkpoints are.

    Args:
        model: a model of transformers.
        tokenizer: the checkpoint's tokenizer; None to write none.
        folder: an empty folder.
        metadata: goes into the header of each shard.
        max_shard_size: as `5GB`.

    Raises:
        UserError: `max_shard_size` is no size.
        OSError: there is no room for it, which is found before anything is written, or something cannot be written.
    """
    check_shard_size(max_shard_size)
    disks.need(folder, sum(tensor.nbytes for tensor in state(model).values()))
    _copy_repeated(model)
    with quiet_transformers():
        _save_model(model, folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in sorted(folder.glob("*.safetensors")):
        add_metadata(file, metadata)


def save_without_weights(blank: Any, tokenizer: Any, folder: Path) -> None:
    """Writes all files of a checkpoint but the weights, as `save` does.

    Args:
        blank: a model of transformers whose tensors are not read; on the meta device for example.
        tokenizer: the checkpoint's tokenizer; None to write none.
        folder: an empty folder.
    """
    with quiet_transformers():
        _save_model(blank, folder, state_dict={})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def _save_model(model: Any, folder: Path, **options: Any) -> None:
    """`save_pretrained`, with a generation config as it is: published ones may contradict themselves.

    transformers before 5.23 refuses to write those.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        model.save_pretrained(folder, **options)
        return
    model.generation_config = type(generation)()
    try:
        model.save_pretrained(folder, **options)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")


def copy_processor(source: Path, folder: Path) -> None:
    """Copies what says how images, sound and video are prepared for a model's towers, as the base has it."""
    for name in _PROCESSORS:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _copy_repeated(model: nn.Module) -> None:
    """Gives each tensor memory of its own: a stack that repeats a layer shares it, which safetensors refuses."""
    seen: set[int] = set()
    for tensor in state(model).values():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor.data = tensor.detach().clone()
        seen.add(tensor.data_ptr())


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Adds to the `__metadata__` of a safetensors file, whose tensors keep their bytes.

    transformers offers no way to pass metadata. Format: 8 bytes little-endian header length, JSON header padded with
    spaces, data (https://github.com/huggingface/safetensors#format).
    """
    changed = file.with_suffix(".metadata")
    with file.open("rb") as source, changed.open("wb") as target:
        header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(source, target, 16 * 2**20)
    changed.replace(file)
