"""PEFT adapters as models: merged into their base once, when the pool is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergesearch.checkpoints.files import read_headers, read_json
from mergesearch.errors import UserError


def check_adapter(folder: Path, where: str) -> None:
    """What can be said against an adapter before a model is loaded.

    Raises:
        UserError: the adapter cannot be merged into weights, its weights are pickled or corrupt.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    read_headers(folder, where, "adapter_model")
    kind = read_json(folder / "adapter_config.json", where).get("peft_type")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if tuner is None or not hasattr(tuner, "merge_and_unload"):
        raise UserError(f"{where}: {folder} is a {kind} adapter, which cannot be merged into weights: use a LoRA")


def adapted(folder: Path, where: str) -> list[str]:
    """The names of an adapter's own tensors, by its headers: each begins with the module or the tensor it changes."""
    headers = read_headers(folder, where, "adapter_model")
    return [key.removeprefix("base_model.model.").replace(".base_layer", "") for key in headers]


def apply_adapter(model: nn.Module, folder: Path, where: str) -> nn.Module:
    """The model with the adapter merged in: plain, rank-stabilised and weight-decomposed LoRA, modules_to_save.

    Arithmetic is in float32, and what the adapter changed stays in float32: the delta of a LoRA is often smaller than
    the spacing of bfloat16 numbers around the weight it is added to, and rounding would erase it before the merge.
    What it did not change keeps the base's dtype and values.

    Raises:
        UserError: the adapter was made for another base.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _merged(model, folder)
    except Exception as error:
        raise _unfit(folder, where, " ".join(str(error).split())[:300]) from None


def _merged(model: nn.Module, folder: Path) -> nn.Module:
    adapted, result = _load(model, folder)
    for kind, keys in (("lacks", result.missing_keys), ("has the unknown", result.unexpected_keys)):
        if keys:
            raise ValueError(f"it {kind} {sorted(keys)[0]}")
    with torch.no_grad():
        return adapted.merge_and_unload().eval()


def _load(model: nn.Module, folder: Path) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    for name, module in model.named_modules():
        # the copy that was trained takes the dtype of the module it replaces
        if any(name == saved or name.endswith(f".{saved}") for saved in getattr(config, "modules_to_save", None) or ()):
            module.float()
    adapted = PeftModel(model, config)
    for layer in [module.get_base_layer() for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        _untie(layer, adapted)
        layer.float()
    return adapted, adapted.load_adapter(str(folder), "default", torch_device="cpu")


def _untie(layer: nn.Module, model: nn.Module) -> None:
    """Gives a layer weights of its own: what an adapter adds to a head must not reach the embedding it is tied to."""
    elsewhere = {id(p) for m in model.modules() if m is not layer for p in m.parameters(recurse=False)}
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if id(parameter) in elsewhere:
            setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _unfit(folder: Path, where: str, reason: str) -> UserError:
    try:
        hint = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        hint = None
    origin = f" (it was trained on {hint})" if hint else ""
    return UserError(
        f"{where}: the adapter {folder} does not fit its base: {reason}{origin}: name the base it was trained on"
    )
