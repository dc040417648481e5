"""Live models by way of transformers: what a checkpoint's files would become, and what they become."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch import memory
from mergesearch.checkpoints.devices import Devices
from mergesearch.checkpoints.files import FLOATING, Header, read_config, read_headers
from mergesearch.errors import UserError

_DTYPES = dict(zip(FLOATING, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))
META = torch.device("meta")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' own progress bars and load reports; what matters is checked and said by the caller."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a live model by name, tied ones once, under the first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """As `floating_tensors`, but the live model's own objects: giving one other `data` changes the model."""
    return {name: tensor for name, tensor in state(model).items() if tensor.is_floating_point()}


def floating_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every floating parameter and persistent buffer of a live model by name, tied ones once."""
    return {name: tensor.detach() for name, tensor in parameters(model).items()}


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent buffer that is not floating: masks, tables, counts. They are copied, not merged."""
    return {name: tensor.detach() for name, tensor in state(model).items() if not tensor.is_floating_point()}


def ties(model: nn.Module) -> dict[str, str]:
    """For each name that a live model ties to another, the name it is tied to."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def stored_dtype(header: Header) -> torch.dtype | None:
    """The dtype of a floating tensor in a file; None of any other."""
    return _DTYPES.get(header.dtype)


# --- from files ---------------------------------------------------------------------------------------------------


def load_config(folder: Path, where: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint; `UserError` where transformers does not know it."""
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        _check_memory(error, folder, where)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{where}: {folder} brings code of its own for its architecture: read that code, and set "
                "trust_remote_code: true (--trust-remote-code) to run it"
            ) from None
        raise UserError(
            f"{where}: transformers cannot read {folder / 'config.json'} ({_reason(error)}): give a checkpoint of an "
            "architecture that the installed transformers knows"
        ) from None


def probe(folder: Path, headers: Mapping[str, Header], where: str, trust_remote_code: bool = False) -> nn.Module:
    """The live model that a checkpoint would become, on the meta device: made from the headers alone.

    transformers fills what a checkpoint lacks with random numbers and leaves out what it does not know; here both are
    errors.

    Raises:
        UserError: missing, unexpected or misshapen tensors, an architecture that transformers does not know.
    """
    config = load_config(folder, where, trust_remote_code)
    blanks = {name: torch.empty(h.shape, device=META, dtype=_DTYPES.get(h.dtype)) for name, h in headers.items()}
    try:
        with quiet_transformers(), META:
            model_class = type(_auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=blanks,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:
        _check_memory(error, folder, where)
        raise UserError(
            f"{where}: transformers cannot build a {config.model_type} model from the tensors of {folder} "
            f"({_reason(error)}): give a complete checkpoint of this architecture"
        ) from None
    _check_complete(info, model, folder, where)
    return model


def _auto_class(config: Any) -> Any:
    """The class of transformers that makes a live model of a configuration: with its towers where it has some."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    several = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if several else AutoModelForCausalLM


def is_causal(folder: Path, where: str) -> bool:
    """Whether transformers has a causal LM's class for a checkpoint's type, which is what `lm_eval --model hf` loads.

    Raises:
        UserError: there is no such checkpoint.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    stated = read_config(folder, where)
    if "AutoModelForCausalLM" in stated.get("auto_map", {}) or stated.get("model_type") not in CONFIG_MAPPING:
        return True
    return CONFIG_MAPPING[stated["model_type"]] in AutoModelForCausalLM._model_mapping


def check_taken(headers: Mapping[str, Header], model: Any, folder: Path, where: str) -> None:
    """`UserError` for a tensor that transformers leaves out in silence and that no configuration gives anew."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    names = model.state_dict().keys()
    # files of the body alone leave the body's name out
    taken = names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    left_out = [
        name
        for name, header in headers.items()
        if any(pattern.search(name) for pattern in patterns) and name not in taken and not is_computed(name, header)
    ]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise UserError(
            f"{where}: tensor {sorted(left_out)[0]} of {folder}{more} would be lost, as a {type(model).__name__} of "
            "transformers takes no such tensor: give a checkpoint without it, if the model is meant to be used so"
        )


def is_computed(name: str, header: Header) -> bool:
    """Whether a tensor is one that architectures kept in their files and compute today: frequencies, causal masks."""
    last = name.rpartition(".")[2]
    square = len(header.shape) == 4 and header.shape[:2] == (1, 1)
    return stored_dtype(header) is None or last.endswith(("inv_freq", "masked_bias")) or (last == "bias" and square)


def _check_complete(info: Mapping[str, Any], model: nn.Module, folder: Path, where: str) -> None:
    said = {"missing_keys": "lacks tensor", "unexpected_keys": "has an unexpected tensor"}
    for kind, words in said.items():
        if info.get(kind):
            name, more = sorted(info[kind])[0], len(info[kind]) - 1
            raise UserError(
                f"{where}: {folder} {words} {name}{f' and {more} more' if more else ''} for a {type(model).__name__}: "
                "give a complete checkpoint of this architecture"
            )
    if info.get("mismatched_keys"):
        name, there, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{where}: tensor {name} of {folder} is {times(there)}, its config.json makes it {times(expected)}: "
            "give a complete checkpoint, or mend its config.json"
        )


def load_model(
    folder: Path, where: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """A checkpoint as a live causal language model on the CPU, in evaluation mode.

    Args:
        dtype: of the live model; None: as the files have it. Where they mix dtypes, each tensor comes in the narrowest
            one of them that holds it without loss.

    Raises:
        UserError: quantised, pickled, truncated or corrupt files; missing, unexpected or misshapen tensors.
    """
    read_config(folder, where)
    headers = read_headers(folder, where)
    check_taken(headers, probe(folder, headers, where, trust_remote_code), folder, where)
    return read_model(folder, headers, where, dtype, trust_remote_code)


def read_model(
    folder: Path, headers: Mapping[str, Header], where: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> nn.Module:
    """As `load_model`, for a checkpoint that was probed already."""
    stored = {_DTYPES[header.dtype] for header in headers.values() if header.dtype in _DTYPES}
    wide = dtype or (torch.float32 if len(stored) != 1 else next(iter(stored)))
    try:
        with quiet_transformers():
            auto = _auto_class(load_config(folder, where, trust_remote_code))
            model = auto.from_pretrained(
                folder, dtype=wide, trust_remote_code=trust_remote_code, local_files_only=True, use_safetensors=True
            )
    except Exception as error:
        _check_memory(error, folder, where)
        raise UserError(f"{where}: transformers cannot load {folder}: {_reason(error)}") from error
    if dtype is None and len(stored) > 1:
        _narrow(model, [d for d in stored if d.itemsize < wide.itemsize])
    return model.eval()


def _narrow(model: nn.Module, dtypes: list[torch.dtype]) -> None:
    """Gives each tensor back the narrower dtype that its file had, where that loses nothing."""
    for tensor in state(model).values():
        for dtype in dtypes if tensor.is_floating_point() else ():
            small = tensor.detach().to(dtype)
            if torch.equal(small.to(tensor.dtype), tensor.detach()):
                tensor.data = small
                break


# --- from tensors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blueprint:
    """How transformers builds a candidate, apart from its weights.

    Attributes:
        model_class: the architecture's class.
        config: its configuration.
        conversions: what transformers does to the base's files when it loads them (fused experts, names), undone when
            a candidate is written.
        generation: the generation configuration, or None for the architecture's own.
    """

    model_class: Any
    config: Any
    conversions: Any = None
    generation: Any = None

    def blank(self) -> nn.Module:
        """The model on the meta device: names and shapes without weights."""
        with quiet_transformers(), META:
            return self._finish(self.model_class(copy.deepcopy(self.config)))

    def build(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, devices: Devices) -> nn.Module:
        """The model that holds `tensors`, by live name; those that have the right dtype and device are not copied.

        Where it is split over several devices, accelerate moves what goes from one part to the next.

        Raises:
            UserError: the configuration asks for other tensors than these.
        """
        with quiet_transformers():
            model, info = self.model_class.from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=dict(tensors),
                dtype=dtype,
                device_map=devices.map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(kind):
                first = sorted(str(key) for key in info[kind])[0]
                raise UserError(f"the layers do not fit together: {kind.removesuffix('_keys')} tensor {first}")
        return self._finish(model)

    def empty(self) -> nn.Module:
        """A model of this configuration whose tensors have no memory: for whatever asks of its configuration alone."""
        with quiet_transformers(), torch.device("meta"):
            return self._finish(self.model_class(copy.deepcopy(self.config)))

    def _finish(self, model: nn.Module) -> nn.Module:
        model._weight_conversions = self.conversions
        if self.generation is not None:
            model.generation_config = copy.deepcopy(self.generation)
        return model.eval()


def generation_config(folder: Path) -> Any | None:
    """A checkpoint's own generation configuration, or None."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    with contextlib.suppress(Exception), quiet_transformers():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return None


def times(shape: Any) -> str:
    """A shape in words: `32x16`."""
    return "x".join(str(n) for n in shape) or "a scalar"


def _check_memory(error: Exception, folder: Path, where: str) -> None:
    """`UserError` where it was memory that a library lacked, and the files may be as they should."""
    if memory.ran_out(error):
        raise UserError(memory.too_little(f"{where}: {folder}")) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).strip().split("\n")[0].split())[:200] or type(error).__name__
