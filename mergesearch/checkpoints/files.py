"""Where a checkpoint's files are and what their headers say: no tensor is read here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch import memory, zoo
from mergesearch.errors import CutError, UserError

# Mistral's repositories hold every weight a second time; subfolders hold other formats.
# README.md states the licence
_DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"]
_LEAVE = ["consolidated*", "*/*"]
# bytes of a file's name, on every common file system
_LONGEST = 255
# what safetensors calls the dtypes of unquantised weights
FLOATING: tuple[str, ...] = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Source:
    """What a reference names: a model's folder, an adapter's folder, or an adapter over a model.

    Attributes:
        reference: as the user wrote it.
        folder: the model's folder; None for an adapter over the pool's base.
        adapter: the PEFT adapter's folder, or None.
    """

    reference: str
    folder: Path | None
    adapter: Path | None = None

    @property
    def path(self) -> Path:
        """The folder that makes this source what it is: the adapter's where there is one."""
        folder = self.adapter or self.folder
        assert folder is not None
        return folder


@dataclass(frozen=True)
class Header:
    """Shape and dtype (as safetensors names it: F32, BF16, ...) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


# --- finding ------------------------------------------------------------------------------------------------------


def locate(reference: str, where: str) -> Source:
    """What a reference names: a folder, `zoo:NAME`, a hub id with an optional `@revision`, or `MODEL+ADAPTER` of these.

    A folder with `adapter_config.json` and no `config.json` is a PEFT adapter over the pool's base.

    Raises:
        UserError: there is no such checkpoint, or the hub cannot be reached.
    """
    model, plus, adapter = reference.rpartition("+")
    if not plus or _path(reference, where).exists():
        folder = _folder(reference, where)
        return Source(reference, None, folder) if _is_adapter(folder) else Source(reference, folder)
    lora = _folder(adapter, where)
    if not (lora / "adapter_config.json").is_file():
        raise UserError(f"{where}: {adapter} in {reference} has no adapter_config.json: put a PEFT adapter after the +")
    return Source(reference, _folder(model, where), lora)


def resolve(reference: str, where: str) -> Path:
    """The local folder of a checkpoint or, for an adapter without its model, of the adapter; raises as `locate`."""
    source = locate(reference, where)
    return source.folder or source.path


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _folder(reference: str, where: str) -> Path:
    if reference.startswith("zoo:"):
        return zoo.path(reference.removeprefix("zoo:"))
    folder = _path(reference, where)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(
            f"{where}: {reference} is a file, not a checkpoint folder: give the folder that holds config.json"
        )
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise UserError(
            f"{where}: no folder {reference!r}: give a checkpoint folder, a hub id (owner/name) or zoo:NAME"
        )
    return _download(reference, where)


def _path(reference: str, where: str) -> Path:
    """The path that a reference is, if it is one; `UserError` where the system cannot even look for it."""
    try:
        path = Path(reference).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = reference if len(reference) <= _LONGEST else f"{reference[:60]}... ({len(reference):,} letters)"
        raise UserError(
            f"{where}: {shown!r} cannot be looked for ({reason}): give a checkpoint folder, a hub id (owner/name) or "
            "zoo:NAME"
        ) from None
    return path


def _download(reference: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=_DOWNLOAD, ignore_patterns=_LEAVE)
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise UserError(
            f"{where}: {reference!r} is no local folder and cannot be fetched from the hub ({type(error).__name__}: "
            f"{reason}): give a folder, or check the name, the revision and the connection"
        ) from None
    return Path(folder)


class Watched:
    """Files that are mapped into memory, of which no page may be read that is no longer there: the system answers with
    SIGBUS, which ends the process without a word.

    A file that was removed, or another one with its name, does no harm: what was mapped stays.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[tuple[int, int], int]] = {}

    def add(self, file: Path) -> None:
        """Notes how large a file is, before it is mapped."""
        there = file.stat()
        self._files.setdefault(file, ((there.st_dev, there.st_ino), there.st_size))

    def check(self) -> None:
        """To be called before tensors are read.

        Raises:
            CutError: a file has become shorter.
        """
        for file, (identity, size) in self._files.items():
            try:
                now = file.stat()
            except OSError:
                continue
            if (now.st_dev, now.st_ino) == identity and now.st_size < size:
                raise CutError(
                    f"{file} had {size:,} bytes when it was opened and has {now.st_size:,} now: put the whole file "
                    "back, and type the same command again (who replaces a model's file while it is in use should "
                    "write the new one beside it and rename it)"
                )


# --- checking -----------------------------------------------------------------------------------------------------


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """config.json of a checkpoint of unquantised weights.

    Raises:
        UserError: there is none, it is no JSON, or it says that the weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{where}: {folder} has no config.json: give the folder of a complete transformers checkpoint")
    config = read_json(path, where)
    if not isinstance(config, dict):
        raise UserError(f"{where}: {path} is no JSON object: fetch the checkpoint again")
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "some method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: {folder} holds weights quantised by {method}: merge the unquantised checkpoint instead"
        )
    return config


def read_json(path: Path, where: str) -> Any:
    """A JSON file; `UserError` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{where}: {path} cannot be read as JSON ({error}): fetch the checkpoint again") from None


def read_headers(folder: Path, where: str, stem: str = "model") -> dict[str, Header]:
    """Every tensor of a folder's safetensors files, `STEM.safetensors` or the shards that its index names.

    Raises:
        UserError: pickled or quantised weights, a missing shard or tensor, a truncated or corrupt file.
    """
    headers: dict[str, Header] = {}
    for file, names in weight_files(folder, where, stem).items():
        in_file = _file_headers(file, where)
        for name in names or ():
            if name not in in_file:
                raise UserError(f"{where}: {file} lacks tensor {name}, which its index names: fetch the file again")
        headers.update(in_file)
    _check_unquantised(headers, folder, where)
    return headers


def weight_files(folder: Path, where: str, stem: str) -> dict[Path, list[str] | None]:
    """The files to read, with the tensors that the index expects in each."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _shards(index, where)
    if (folder / f"{stem}.safetensors").is_file():
        return {folder / f"{stem}.safetensors": None}
    pickled = next((p for suffix in ("bin", "pt", "pth", "ckpt") for p in sorted(folder.glob(f"*.{suffix}"))), None)
    if pickled is not None and pickled.name != "training_args.bin":
        raise UserError(
            f"{where}: {folder} holds pickled weights alone ({pickled.name}), which can run code when loaded: "
            "convert them to safetensors first"
        )
    raise UserError(
        f"{where}: {folder} has no {stem}.safetensors: give the folder of a complete safetensors checkpoint"
    )


def _shards(index: Path, where: str) -> dict[Path, list[str] | None]:
    data = read_json(index, where)
    placed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{where}: {index} has no weight_map: fetch the checkpoint again")
    files: dict[Path, list[str] | None] = {}
    for tensor, name in placed.items():
        _check_plain(name, tensor, index, where)
    for tensor, name in sorted(placed.items(), key=lambda item: item[1]):
        file = index.parent / name
        if not file.is_file():
            raise UserError(f"{where}: {index.parent} lacks {name}, which its index names: fetch the checkpoint again")
        files[file] = [*(files.get(file) or ()), tensor]
    return files


def _check_plain(name: Any, tensor: str, index: Path, where: str) -> None:
    """`UserError` where an index names no file beside it. A file may be a link, as the hub's cache makes them; whoever
    wrote the index does not choose what is read elsewhere."""
    if not isinstance(name, str):
        raise UserError(
            f"{where}: {index} gives {json.dumps(name)[:100]} for tensor {tensor[:200]}, which is no file's name: "
            "fetch the checkpoint again"
        )
    if name in ("", ".", "..") or len(name.encode(errors="replace")) > _LONGEST or any(c in name for c in "/\\:\0"):
        raise UserError(
            f"{where}: {index} names the file {name[:200]!r} for tensor {tensor[:200]}, and only files beside it are "
            "read: fetch the checkpoint again, or put the file into the folder and its plain name there"
        )


def _file_headers(file: Path, where: str) -> dict[str, Header]:
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Header(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except Exception as error:
        if memory.ran_out(error):
            raise UserError(memory.too_little(f"{where}: {file}")) from None
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"{where}: {file} cannot be read ({why}): check its permissions") from None
        raise UserError(f"{where}: {file} is truncated or corrupt ({error}): fetch the file again") from None


def _check_unquantised(headers: dict[str, Header], folder: Path, where: str) -> None:
    for name, header in headers.items():
        floating = header.dtype in FLOATING
        if (header.dtype.startswith("F") and not floating) or (name.endswith("weight") and not floating):
            raise UserError(
                f"{where}: {folder} holds quantised weights, tensor {name} is {header.dtype}: "
                "merge the unquantised checkpoint instead"
            )
