"""A merge written as a PEFT adapter over its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch.checkpoints.files import read_json
from mergesearch.checkpoints.lowrank import tied_names
from mergesearch.checkpoints.pool import Pool
from mergesearch.checkpoints.writing import add_metadata
from mergesearch.errors import UserError
from mergesearch.methods.matrices import signs

# what linear layers are called whose weights are (in, out)
_TURNED = "Conv1D"


@dataclass
class Adapter:
    """What a candidate changes of its base, as PEFT holds it.

    Attributes:
        factors: for each linear layer B (out, r) and A (r, in): its weight changes by B A.
        saved: the whole weights and biases of other layers, by layer and then by name.
        turned: the layers' weights are (in, out), as GPT-2's are.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    turned: bool = False

    @property
    def ranks(self) -> list[int]:
        """Of the layers, in no order."""
        return [a.shape[0] for _, a in self.factors.values()]


def holders(pool: Pool) -> dict[str, tuple[str, str]]:
    """For each live tensor of a candidate its layer's name and how an adapter can hold a change of it.

    That is `factors`, `turned` (factors of a weight that is (in, out)), `saved` (as a whole), or in words why not.
    """
    blank = pool.form.blueprint.blank()
    modules = dict(blank.named_modules())
    tied = tied_names(blank)
    held: dict[str, tuple[str, str]] = {}
    for name, _ in blank.named_parameters(remove_duplicate=False):
        owner, _, own = name.rpartition(".")
        module = modules[owner]
        if own == "weight" and isinstance(module, nn.Linear) and name not in tied:
            held[name] = (owner, "factors")
        elif own == "weight" and type(module).__name__ == _TURNED:
            held[name] = (owner, "turned")
        elif name in tied:
            held[name] = (owner, "the embedding that the head is tied to")
        elif any(True for _ in module.children()) or own not in ("weight", "bias") or isinstance(module, nn.Linear):
            held[name] = (owner, "a bias of a linear layer" if own == "bias" else "not a layer's own weight")
        else:
            held[name] = (owner, "saved")
    return held


def joint_rank(pool: Pool) -> int | None:
    """The sum of the ranks of the pool's adapters; None where a model is none."""
    total = 0
    for model in pool.models.values():
        if not (model.folder / "adapter_config.json").is_file():
            return None
        config = read_json(model.folder / "adapter_config.json", model.reference)
        total += max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    return total or None


def write_adapter(adapter: Adapter, base: str, folder: Path, metadata: Mapping[str, str]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: what the candidate changes.
        base: what the configuration names as its base.
        folder: is there.
        metadata: goes into the header of the weights' file.

    Raises:
        UserError: nothing is changed, so that there is no adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not adapter.factors:
        raise UserError("this candidate changes no linear layer of its base: there is no adapter to export")
    ranks = {name: a.shape[0] for name, (_, a) in adapter.factors.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    # alpha is each layer's rank, so that B A is added as it is
    config = LoraConfig(
        task_type="CAUSAL_LM", r=most, lora_alpha=most, target_modules=sorted(ranks), rank_pattern=others,
        alpha_pattern=dict(others), modules_to_save=sorted(adapter.saved) or None, fan_in_fan_out=adapter.turned,
        inference_mode=True, base_model_name_or_path=base, lora_dropout=0.0, bias="none",
    )  # fmt: skip
    config.save_pretrained(str(folder))
    _settle(folder / "adapter_config.json")
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in adapter.factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    for name, own in adapter.saved.items():
        tensors.update({f"base_model.model.{name}.{key}": value.contiguous() for key, value in own.items()})
    file = folder / "adapter_model.safetensors"
    save_file(tensors, str(file), metadata={"format": "pt"})
    add_metadata(file, metadata)


def _settle(file: Path) -> None:
    """The same bytes for the same adapter: PEFT writes sets in no order."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    data["target_modules"] = sorted(data["target_modules"])
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def factors_of(change: Tensor, noise: float, most: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    """B (out, r) and A (r, in) in float32 with B A nearest to a float64 change, and how far off that is.

    Args:
        change: (out, in).
        noise: singular values up to this are rounding errors.
        most: the largest rank; None for as many as are no noise.
    """
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = max(1, min(int((s > noise).sum()), most or len(s)))
    root = s[:rank].sqrt() * signs(u[:, :rank])
    b = (u[:, :rank] * root).float()
    a = (v[:rank] * root[:, None]).float()
    return (b, a), float((change - b.double() @ a.double()).norm())
