"""What a mergekit file may hold, and what its parameters are called here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from mergesearch import methods
from mergesearch.errors import UserError, unknown
from mergesearch.methods import Method

log: logging.Logger = logging.getLogger(__name__)

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
MODEL = ("model", "parameters")
SLICE = ("sources", "parameters", "base_model")
SOURCE = ("model", "layer_range", "parameters")
TOKENIZER = ("source",)

# what mergekit knows and we do not, with what to do about it
UNSUPPORTED = {
    "modules": "merge the language model alone, with models or slices",
    "chat_template": "copy the template into the result's tokenizer afterwards",
    "residual_weight": "use linear with a weight for each model",
    "tokens": "name a tokenizer source alone",
    "pad_to_multiple_of": "name a tokenizer source alone",
    "name": "it belongs to mergekit-multi: merge each of its documents by a file of its own",
    "input_model_parameters": "write the parameters under each model",
    "experts": "it belongs to mergekit-moe, which builds a mixture and merges nothing",
    "gate_mode": "it belongs to mergekit-moe, which builds a mixture and merges nothing",
    "out_path": "give the output folder on the command line",
}

# mergekit's merge methods that are here under the same name
METHODS = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "model_stock", "arcee_fusion", "passthrough"),
    *(
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
    ),
    *("sce", "ram", "ramplus_tl"),
)
# what an export can express: those, and the plain average as mergekit's `linear`
EXPORTED: tuple[str, ...] = (*METHODS, "uniform_soup")
# ours -> mergekit's, where the names differ
RENAMED = {
    ("nuslerp", "flatten"): "nuslerp_flatten",
    ("nuslerp", "row_wise"): "nuslerp_row_wise",
    ("multislerp", "normalize"): "normalize_weights",
}
# what mergekit refuses to do without
_WEIGHTED = (
    *("linear", "nuslerp", "multislerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
)
REQUIRED: dict[str, tuple[str, ...]] = {"weight": _WEIGHTED, "t": ("slerp", "nearswap")}
# parameters of ours that mergekit's method of that name does not have
OURS_ALONE: dict[str, tuple[str, ...]] = {
    "sce": ("weight", "lambda", "normalize"),
    "ram": ("weight", "lambda"),
    "ramplus_tl": ("weight", "lambda"),
}
# the same for every method
OURS_EVERYWHERE: tuple[str, ...] = ("samples", "q")
# mergekit's first input is its base_model
FIRST_IS_BASE = ("slerp", "nearswap", "arcee_fusion")
# the base_model is one more input
BASE_IS_INPUT = (*FIRST_IS_BASE, "linear", "karcher", "passthrough")
RANDOM_RESCALE = ("dare_linear", "dare_ties", "della", "della_linear")


def method(name: Any, where: str) -> Method:
    """The method a mergekit file names; `UserError` with the nearest name where there is none."""
    if name not in METHODS:
        raise unknown("merge method", str(name), METHODS, where)
    return methods.get(name, where)


def their_key(method_name: str, key: str) -> str:
    """What mergekit calls a parameter of ours."""
    return RENAMED.get((method_name, key), key)


def keys_of(chosen: Method) -> dict[str, str]:
    """mergekit's name -> ours for every parameter that a file may give to a method."""
    return {their_key(chosen.name, key): key for key in chosen.parameters if key not in OURS_EVERYWHERE}


def from_source(chosen: Method, key: str) -> bool:
    """Whether mergekit looks a parameter of ours up for each input rather than once."""
    return chosen.parameters[key].per_model or key == "scale"


def is_required(chosen: Method, key: str) -> bool:
    return chosen.name in REQUIRED.get(key, ())


def has_no_effect(chosen: Method, key: str) -> bool:
    """Whether mergekit takes a parameter and gives the same tensors whatever its value: storage of masks, and what
    `task_arithmetic`, which makes nothing sparse, shares with its relatives."""
    return key == "int8_mask" or (chosen.name == "task_arithmetic" and key in ("density", "rescale"))


def check_keys(data: Any, known: Iterable[str], where: str) -> Mapping[str, Any]:
    """`data` as a mapping with known keys alone.

    Raises:
        UserError: it is no mapping, holds what is not supported, or an unknown key.
    """
    if not isinstance(data, Mapping):
        keys = ", ".join(known)
        raise UserError(f"{where} is {data!r}: give a mapping{' with ' + keys if keys else ''}")
    for key, value in data.items():
        if key in known:
            continue
        if key in UNSUPPORTED:
            if value is None:
                continue
            raise UserError(f"{key} in {where} is not supported: {UNSUPPORTED[key]}")
        raise unknown("key", str(key), known, where)
    return data
