"""What keeps a model from being merged with the base: each answer is one sentence with the model and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergesearch.checkpoints.checkpoint import Checkpoint
from mergesearch.checkpoints.files import Header
from mergesearch.checkpoints.layout import Layout
from mergesearch.checkpoints.loading import floating_tensors, ties, times
from mergesearch.errors import UserError

# A fine-tune moves weights by a few percent of their norm; independently trained weights lie about 1.4 apart.
UNRELATED = 1.0
# small enough to stay in the cache: fresh memory for whole tensors is what takes the time
_BLOCK = 2**18

# What must be equal although tensors of equal shape can differ in it, or what names a difference better than a shape.
_SAME = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "intermediate_size", "num_experts", "num_local_experts",
)  # fmt: skip
# What changes how the merged weights run: the result has the base's, which the user should know.
_TOLD = ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "hidden_act", "rms_norm_eps")


def configurations(base: Mapping[str, Any], config: Mapping[str, Any], folder: Path, where: str) -> list[str]:
    """Notes on what the result takes from the base's config.json.

    Raises:
        UserError: another architecture or another size.
    """
    if config.get("model_type") != base.get("model_type"):
        raise UserError(
            f"{where}: {folder} is a {config.get('model_type')!r} model, the base a {base.get('model_type')!r}: "
            "merge models of one architecture, fine-tuned from the base"
        )
    for key in _SAME:
        mine, theirs = base.get(key), config.get(key)
        if None not in (mine, theirs) and mine != theirs:
            raise UserError(
                f"{where}: {key} of {folder} is {theirs}, the base's {mine}: merge models of one size, fine-tuned "
                "from the base"
            )
    return [
        f"{where}: its config.json has {key} {config[key]!r}, the base {base[key]!r}; the result has the base's"
        for key in _TOLD
        if key in base and key in config and base[key] != config[key]
    ]


def names(base: Mapping[str, Header], headers: Mapping[str, Header], folder: Path, where: str) -> None:
    """Raises `UserError` for the first tensor that only one of two checkpoints has."""
    for name in sorted(base.keys() - headers.keys()):
        raise UserError(
            f"{where}: {folder} lacks tensor {name}, which the base has: give a complete checkpoint of its architecture"
        )
    for name in sorted(headers.keys() - base.keys()):
        raise UserError(
            f"{where}: {folder} has tensor {name}, which the base lacks: give a checkpoint of the base's architecture"
        )


def shapes(blanks: Mapping[str, nn.Module], folders: Mapping[str, Path], aligned: bool) -> None:
    """Compares each live model on the meta device, by place, with the first one, the base.

    Args:
        aligned: embeddings and head are aligned by token, so their numbers of rows may differ.

    Raises:
        UserError: a tensor that one of them lacks, or that has another shape.
    """
    (_, base), *others = blanks.items()
    ours, by_token = _shapes(base), Layout.of(base).by_token if aligned else frozenset()
    for where, other in others:
        theirs = _shapes(other)
        for name in sorted(ours.keys() ^ theirs.keys()):
            words = "lacks tensor" if name in ours else "has one tensor more than the base,"
            raise UserError(f"{where}: {folders[where]} {words} {name}: merge models of one architecture")
        for name, shape in ours.items():
            start = 1 if name in by_token else 0
            if theirs[name][start:] != shape[start:]:
                raise UserError(
                    f"{where}: tensor {name} of {folders[where]} is {times(theirs[name])}, in the base {times(shape)}: "
                    "merge models fine-tuned from the base, of one size"
                )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes_of = {name: tuple(tensor.shape) for name, tensor in floating_tensors(model).items()}
    return {**shapes_of, **{alias: shapes_of[name] for alias, name in ties(model).items() if name in shapes_of}}


def other_rows(where: str, rows: int, count: int) -> str:
    """A note on a model whose embedding has another size than the result's although their tokens are the same."""
    what = (
        f"its last {rows - count} rows are left out"
        if rows > count
        else f"rows of the others stand for the {count - rows} that it lacks"
    )
    return (
        f"{where}: its embedding has {rows} rows, the result's {count}, for the same tokens: {what}, and no token of "
        "the tokenizer has them"
    )


def repeated(where: str, before: str, reference: str, is_base: bool) -> str:
    """A note on a model that is the base or another model."""
    what = (
        "its task vector is zero, and merges that weigh task vectors only become smaller by it"
        if is_base
        else "what it says counts twice"
    )
    return f"{where}: {reference} is {before} once more, so {what}: leave it out unless that is meant"


def numbers(base: Checkpoint, model: Checkpoint, where: str, allow_unrelated: bool) -> None:
    """Reads every number of a parent once.

    Raises:
        UserError: NaN or infinity; a task vector as large as the base, so that the two share no ancestor.
    """
    distance, size = 0.0, 0.0
    for name, tensor in base.tensors.items():
        other = model.tensors[name]
        own, apart, below = _squares(other, tensor)
        if not math.isfinite(own) and not torch.isfinite(other).all():
            raise UserError(f"{where}: tensor {name} of {model.folder} holds NaN or infinity: fetch or train it again")
        distance, size = distance + apart, size + below
    ratio = (distance / size) ** 0.5 if size else 0.0
    if ratio >= UNRELATED and not allow_unrelated:
        raise UserError(
            f"{where}: the task vector of {model.folder} has {ratio:.2f} times the norm of the base, so it was hardly "
            "fine-tuned from it: name the right base, or set allow_unrelated: true (--allow-unrelated)"
        )


def _squares(tensor: Tensor, base: Tensor) -> tuple[float, float, float]:
    """The squared norms of a tensor, of its difference from the base's, and of the base's, block by block."""
    totals = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(tensor.reshape(-1).split(_BLOCK), base.reshape(-1).split(_BLOCK), strict=True):
        x, y = x.float(), y.float()
        d = x - y
        totals += torch.stack([x.dot(x), d.dot(d), y.dot(y)]).double().cpu()
    own, apart, below = totals.tolist()
    return own, apart, below
