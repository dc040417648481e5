"""Weights that an adapter changes, held as the base's tensor and the adapter's factors until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mergesearch.checkpoints.files import read_json
from mergesearch.errors import UserError

# how an adapter's factors may begin; other ways change the base's own weights, and are read whole
_PLAIN_STARTS = (True, False, "gaussian", None)
_PREFIX = "base_model.model."
_LINEAR = ("Linear", "Conv1D")


class LowRank(Tensor):
    """W + scale B A in float32, of which W, the base's own tensor, and the factors are in memory and nothing else.

    Whatever is done with it is done with `expanded(...)`: torch sees an ordinary float32 tensor, made anew each time.

    Attributes:
        start: W, (out, in), as the base has it, or (in, out) where `turned`.
        b, a: (out, r) and (r, in), float32.
        scale: of their product.
        turned: W is (in, out), as GPT-2's weights are, and the product is added transposed.
    """

    start: Tensor
    b: Tensor
    a: Tensor
    scale: float
    turned: bool

    @staticmethod
    def __new__(cls, start: Tensor, b: Tensor, a: Tensor, scale: float, turned: bool) -> LowRank:
        made = Tensor._make_wrapper_subclass(cls, start.shape, dtype=torch.float32, device=start.device)  # type: ignore[attr-defined]
        made.start, made.b, made.a, made.scale, made.turned = start, b, a, scale, turned
        return made

    def __repr__(self, **_: Any) -> str:
        return f"LowRank({tuple(self.shape)}, rank {self.a.shape[0]})"

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(expanded, args), **tree_map(expanded, kwargs or {}))


def expanded(tensor: Any) -> Any:
    """A low-rank tensor as a whole one, by the arithmetic of PEFT's own merge; what is none, as it is."""
    if not isinstance(tensor, LowRank):
        return tensor
    product = tensor.b @ tensor.a
    # a new tensor each time: added into in place
    change = (product.T.contiguous() if tensor.turned else product) * tensor.scale
    return change.add_(tensor.start)


def stored(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What is in memory for parents' tensors, each once: of a low-rank one its factors, its start being the base's."""
    once = {id(tensor): tensor for tensor in tensors}.values()
    return [part for t in once for part in ((t.b, t.a) if isinstance(t, LowRank) else (t,))]


def factored(
    blank: nn.Module,
    folder: Path,
    base: Mapping[str, Tensor],
    place: Callable[[str, Tensor], Tensor],
    read: Callable[[Path], Mapping[str, Tensor]],
) -> dict[str, Tensor] | None:
    """The live tensors of an adapter over the pool's base, what it does not change being the base's own.

    Args:
        blank: the base's structure.
        folder: the adapter's.
        base: the base's live tensors.
        place: brings a factor to where the parents' tensor of that name is held.
        read: gives the tensors of the adapter's file, or others of the same shapes.

    Returns:
        None for an adapter that is more than plain factors of linear layers (weight-decomposed, with layers saved
        whole, over an embedding, unfit for its base): `apply_adapter` reads those, and says what is wrong with them.
    """
    try:
        config = read_json(folder / "adapter_config.json", str(folder))
    except UserError:
        return None
    file = folder / "adapter_model.safetensors"
    if not _is_plain(config) or not file.is_file():
        return None
    modules = {n: m for n, m in blank.named_modules() if type(m).__name__ in _LINEAR}
    tied = tied_names(blank)
    factors = _factors(read(file))
    if factors is None or factors.keys() != _targets(folder, modules):
        return None
    live = dict(base)
    for name, (b, a) in factors.items():
        weight = f"{name}.weight"
        turned = type(modules[name]).__name__ == "Conv1D"
        shape = (b.shape[0], a.shape[1])
        fits = weight in base and weight not in tied and b.shape[1] == a.shape[0]
        if not fits or tuple(base[weight].shape) != (shape[::-1] if turned else shape):
            return None
        if turned != bool(config.get("fan_in_fan_out")):
            return None
        scale = _scale(config, name, a.shape[0])
        live[weight] = LowRank(base[weight], place(weight, b.float()), place(weight, a.float()), scale, turned)
    return live


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for nothing but products of factors."""
    more = (
        "use_dora", "modules_to_save", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
        "alora_invocation_tokens", "use_qalora", "corda_config", "eva_config", "arrow_config", "use_bdlora",
        "kasa_config", "velora_config", "monteclora_config", "lora_ga_config", "loftq_config",
    )  # fmt: skip
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    starts = config.get("init_lora_weights", True) in _PLAIN_STARTS
    return plain and starts and not any(config.get(key) for key in more)


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """B and A by layer; None where the file holds anything else."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, which = key.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".")
        if not key.startswith(_PREFIX) or not key.endswith(".weight") or which not in ("lora_A", "lora_B"):
            return None
        parts.setdefault(name, {})[which] = tensor
    if any(len(part) != 2 or part["lora_A"].ndim != 2 for part in parts.values()):
        return None
    return {name: (part["lora_B"], part["lora_A"]) for name, part in parts.items()}


def _targets(folder: Path, modules: Mapping[str, nn.Module]) -> set[str]:
    """The linear layers that the configuration means."""
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = PeftConfig.from_pretrained(str(folder))
    return {name for name in modules if check_target_module_exists(config, name)}


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def tied_names(model: nn.Module) -> set[str]:
    """The names of the parameters that a model has under several names."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}
