"""Checkpoint and Pool: reading the base and its models, aligning them once, writing what was merged."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch import zoo
from mergesearch.errors import UserError
from mergesearch.recipe import TensorInfo

# A fine-tune moves weights by a few percent of their norm; independently trained weights lie about 1.4 apart.
UNRELATED = 1.0


# --- finding and checking files -----------------------------------------------------------------------------------


def resolve(reference: str, where: str) -> Path:
    """The local folder of a checkpoint: a folder, `zoo:NAME`, or a hub id with an optional `@revision`.

    Raises:
        UserError: there is no such checkpoint, or the hub cannot be reached.
    """
    if reference.startswith("zoo:"):
        return zoo.path(reference.removeprefix("zoo:"))
    folder = Path(reference).expanduser()
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


def _download(reference: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{where}: {reference!r} is no local folder and cannot be fetched from the hub ({type(error).__name__}: "
            f"{reason}): give a folder, or check the name and the connection"
        ) from None


def check_files(folder: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, read from the headers alone.

    Raises:
        UserError: no config.json, quantised or pickled weights, a missing shard, a truncated or corrupt file.
    """
    config = _read_config(folder, where)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "a quantisation")
        raise UserError(
            f"{where}: {folder} holds weights quantised by {method}: merge the unquantised checkpoint instead"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder, where):
        shapes.update(_header_shapes(file, where))
    return shapes


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{where}: {folder} has no config.json: give the folder of a complete transformers checkpoint")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {path} cannot be read as JSON ({error}): fetch the checkpoint again") from None


def _weight_files(folder: Path, where: str) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if not (folder / name).is_file():
                raise UserError(f"{where}: {folder} lacks {name}, which its index names: fetch the checkpoint again")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{where}: {folder} holds pickled weights (pytorch_model.bin) alone, which can run code when loaded: "
            "convert it to safetensors first"
        )
    raise UserError(f"{where}: {folder} has no model.safetensors: give the folder of a complete safetensors checkpoint")


def _header_shapes(file: Path, where: str) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{where}: {file} is truncated or corrupt ({error}): fetch the file again") from None


# --- loading ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' own progress bars and load reports; what matters is checked and said by the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(
    folder: Path, where: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> nn.Module:
    """A checkpoint as a live causal language model on the CPU, in evaluation mode.

    Raises:
        UserError: transformers cannot load it, or tensors are missing, unexpected or misshapen.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: transformers cannot load {folder}: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            first = sorted(str(key) for key in info[kind])[0]
            raise UserError(
                f"{where}: {folder} has {kind.removesuffix('_keys')} tensors for a {type(model).__name__}, first "
                f"{first}: give a complete checkpoint of this architecture"
            )
    return model.eval()


def floating_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every floating parameter and persistent buffer of a live model by name, tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def describe(model: nn.Module) -> tuple[list[TensorInfo], int]:
    """Layer and component of every floating tensor of a live model, and the number of its decoder layers."""
    prefix, layers = _decoder_layers(model)
    modules = dict(model.named_modules())
    infos = []
    for name, tensor in floating_tensors(model).items():
        layer, component = _place(name, prefix, layers, modules, model)
        infos.append(TensorInfo(name, layer, component, tuple(tensor.shape)))
    return infos, layers


def _decoder_layers(model: nn.Module) -> tuple[str, int]:
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name + ".", count
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: this architecture is not supported")


def _place(name: str, prefix: str, layers: int, modules: Mapping[str, nn.Module], model: nn.Module) -> tuple[int, str]:
    owner = modules[name.rpartition(".")[0]]
    is_norm = "norm" in type(owner).__name__.lower()
    if name.startswith(prefix):
        index, _, inside = name.removeprefix(prefix).partition(".")
        return int(index), "norm" if is_norm else _component_inside(inside, prefix + index, modules)
    if isinstance(owner, nn.Embedding):
        return 0, "embedding"
    if owner is model.get_output_embeddings():
        return layers - 1, "head"
    return layers - 1, "norm" if is_norm else "head"


def _component_inside(inside: str, layer: str, modules: Mapping[str, nn.Module]) -> str:
    parts = inside.split(".")[:-1]
    chain = [(part, modules[".".join([layer, *parts[: i + 1]])]) for i, part in enumerate(parts)]
    words = [f"{part} {type(module).__name__}".lower() for part, module in chain]
    if any("expert" in word for word in words):
        return "experts"
    if (words and any(key in words[-1] for key in ("router", "topk"))) or (parts and parts[-1] == "gate"):
        return "router"
    return "attention" if any("attn" in word or "attention" in word for word in words) else "mlp"


# --- the pool -----------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """One parent: its reference, its folder, and its floating tensors by live name, in their own dtype."""

    reference: str
    folder: Path
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass
class Pool:
    """The base and all models, aligned: the same tensor names and shapes in each.

    Attributes:
        base: the shared pretrained checkpoint.
        models: the fine-tuned checkpoints by name.
        infos: layer and component of each tensor.
        layers: the number of decoder layers.
        tokenizer: the base's tokenizer, whose vocabulary every model shares.
        tokenizers: each model's own, by name; those that have none have the base's.
    """

    base: Checkpoint
    models: dict[str, Checkpoint]
    infos: list[TensorInfo]
    layers: int
    tokenizer: Any
    tokenizers: Mapping[str, Any]
    device: torch.device
    trust_remote_code: bool = False

    @classmethod
    def load(
        cls,
        base: str,
        models: Mapping[str, str],
        *,
        device: str = "auto",
        trust_remote_code: bool = False,
        allow_unrelated: bool = False,
    ) -> Pool:
        """Reads, checks and aligns the base and the models.

        Raises:
            UserError: anything that keeps them from being merged, with the model and the tensor.
        """
        target = choose_device(device)
        references = {"base_model": base, **{f"models.{name}": reference for name, reference in models.items()}}
        folders = {where: resolve(reference, where) for where, reference in references.items()}
        _check_alike(folders)
        tokenizers = _alike_tokenizers(folders, trust_remote_code)
        loaded: dict[str, Checkpoint] = {}
        infos, layers = [], 0
        for where, folder in folders.items():
            model = load_model(folder, where, trust_remote_code=trust_remote_code)
            if not infos:
                infos, layers = describe(model)
            tensors = {name: tensor.to(target) for name, tensor in floating_tensors(model).items()}
            loaded[where] = Checkpoint(references[where], folder, tensors)
            _check_tensors(loaded["base_model"], loaded[where], where, allow_unrelated)
        return cls(
            base=loaded["base_model"],
            models={name: loaded[f"models.{name}"] for name in models},
            infos=infos,
            layers=layers,
            tokenizer=tokenizers["base_model"],
            tokenizers={name: tokenizers[f"models.{name}"] for name in models},
            device=target,
            trust_remote_code=trust_remote_code,
        )

    def new_model(self, dtype: torch.dtype) -> nn.Module:
        """A live model with the base's weights, on the pool's device."""
        model = load_model(self.base.folder, "base_model", dtype, self.trust_remote_code)
        return model.to(self.device)

    @property
    def parameters(self) -> int:
        """How many numbers one candidate has."""
        return sum(tensor.numel() for tensor in self.base.tensors.values())


def choose_device(device: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names on this machine.

    Raises:
        UserError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}: use auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise UserError(f"device is {device!r}, but this machine has {count} CUDA devices: use auto or cpu")
    return chosen


def _check_alike(folders: Mapping[str, Path]) -> None:
    base_config, base_shapes = None, None
    for where, folder in folders.items():
        shapes, config = check_files(folder, where), _read_config(folder, where)
        if base_config is None or base_shapes is None:
            base_config, base_shapes = config, shapes
            continue
        if config.get("model_type") != base_config.get("model_type"):
            raise UserError(
                f"{where}: {folder} is a {config.get('model_type')!r} model, the base a "
                f"{base_config.get('model_type')!r}: merge models of one architecture, fine-tuned from the base"
            )
        for name in shapes.keys() & base_shapes.keys():
            if shapes[name] != base_shapes[name]:
                raise UserError(
                    f"{where}: tensor {name} is {_times(shapes[name])}, in the base {_times(base_shapes[name])}: "
                    f"merge models fine-tuned from the base, not of another size or vocabulary"
                )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape) or "a scalar"


def _alike_tokenizers(folders: Mapping[str, Path], trust_remote_code: bool) -> dict[str, Any]:
    """The tokenizer of each parent, the base's where it has none of its own; all have one vocabulary."""
    found: dict[str, Any] = {}
    for where, folder in folders.items():
        tokenizer = load_tokenizer(folder, where, trust_remote_code) or found.get("base_model")
        if tokenizer is None:
            raise UserError(f"{where}: {folder} has no tokenizer that transformers can load: add the tokenizer's files")
        found[where] = tokenizer
        differing = dict(tokenizer.get_vocab().items() ^ found["base_model"].get_vocab().items())
        if differing:
            raise UserError(
                f"{where}: the tokenizer of {folder} differs from the base's in {len(differing)} tokens, "
                f"first {min(differing)!r}: merge models that share the base's tokenizer"
            )
    return found


def load_tokenizer(folder: Path, where: str, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer in a folder, or None where there is none; `UserError` where it cannot be loaded."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: the tokenizer in {folder} cannot be loaded: {reason}") from None


def _check_tensors(base: Checkpoint, model: Checkpoint, where: str, allow_unrelated: bool) -> None:
    for name in base.tensors.keys() ^ model.tensors.keys():
        which = "lacks" if name in base.tensors else "has one tensor more than the base:"
        raise UserError(f"{where}: {model.folder} {which} {name}: merge models of one architecture, tied alike")
    distance, size = 0.0, 0.0
    for name, tensor in base.tensors.items():
        other = model.tensors[name]
        if other.shape != tensor.shape:
            raise UserError(
                f"{where}: tensor {name} is {_times(tuple(other.shape))}, in the base {_times(tuple(tensor.shape))}"
            )
        if not torch.isfinite(other).all():
            raise UserError(f"{where}: tensor {name} of {model.folder} holds NaN or infinity: fetch or train it again")
        distance += float((other.float() - tensor.float()).square().sum(dtype=torch.float64))
        size += float(tensor.float().square().sum(dtype=torch.float64))
    ratio = (distance / size) ** 0.5 if size else 0.0
    if ratio >= UNRELATED and not allow_unrelated:
        raise UserError(
            f"{where}: the task vector of {model.folder} has {ratio:.2f} times the norm of the base, so it was hardly "
            "fine-tuned from it: name the right base, or set allow_unrelated: true"
        )


# --- writing ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` when all is written and vanishes when anything fails.

    Raises:
        UserError: `out` exists and is not empty, or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {out.parent} ({error.strerror}): name another folder") from None
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Takes a folder that was written here away, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def save(
    model: nn.Module, tokenizer: Any, folder: Path, metadata: Mapping[str, str], max_shard_size: str = "5GB"
) -> None:
    """Writes a complete checkpoint: config, generation config, tokenizer, and safetensors shards carrying `metadata`.

    Goes through transformers, so that what the live model holds in another form (fused experts, tied embeddings)
    is written as the architecture's checkpoints are.
    """
    with _quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    for file in sorted(folder.glob("*.safetensors")):
        _add_metadata(file, metadata)


def _add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
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
