"""Which tensors a live model is made of: the unit that a rule covers and a method merges.

The unit is the tensor as the checkpoint's files have it. Where transformers keeps several of them fused in one live
tensor (the experts of a mixture), each is a view of the live tensor: so trimming is per expert, names are those of
the files, and masks do not depend on how a version of transformers fuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergesearch.checkpoints.loading import state
from mergesearch.errors import UserError
from mergesearch.recipe import TOWER, TensorInfo


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint's files, as the whole or a view of a live tensor.

    Attributes:
        name: in the files.
        live: the name of the live tensor.
        shape, stride, offset: of the view, in elements of a contiguous live tensor.
        whole: the view is all of the live tensor.
    """

    name: str
    live: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    whole: bool

    def view(self, live: Mapping[str, Tensor]) -> Tensor:
        tensor = live[self.live]
        return (
            tensor if self.whole else tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)
        )


@dataclass(frozen=True)
class Layout:
    """The tensors of a model, in order.

    Attributes:
        pieces: every floating tensor of the files.
        infos: layer and component of each piece.
        layers: the number of decoder layers.
        prefix: what the live names of decoder layers begin with: `model.layers.`.
        by_token: live names whose first dimension is the vocabulary: embeddings and head.
    """

    pieces: tuple[Piece, ...]
    infos: tuple[TensorInfo, ...]
    layers: int
    prefix: str
    by_token: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of a live model, which may lie on the meta device.

        Raises:
            UserError: a model without one list of decoder layers.
        """
        prefix, layers = _decoder_layers(model)
        modules = dict(model.named_modules())
        pieces = _pieces(model)
        infos, language = [], _language(model)
        for piece in pieces:
            owner = id(modules[piece.live.rpartition(".")[0]])
            tower = language is not None and owner not in language
            layer, component = (0, TOWER) if tower else _place(piece.live, prefix, layers, modules, model)
            infos.append(TensorInfo(piece.name, layer, component, piece.shape))
        return cls(tuple(pieces), tuple(infos), layers, prefix, _by_token(model))

    def views(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every piece of a model's live tensors, by name."""
        return {piece.name: piece.view(live) for piece in self.pieces}

    def in_layer(self, piece: Piece, layer: int) -> Piece | None:
        """The piece at the same place in another decoder layer of this layout; itself outside the layers."""
        if not piece.live.startswith(self.prefix):
            return self._by_place.get((piece.live, piece.offset))
        inside = piece.live.removeprefix(self.prefix).partition(".")[2]
        return self._by_place.get((f"{self.prefix}{layer}.{inside}", piece.offset))

    @cached_property
    def named(self) -> dict[str, Piece]:
        """The pieces by name."""
        return {piece.name: piece for piece in self.pieces}

    @cached_property
    def _by_place(self) -> dict[tuple[str, int], Piece]:
        return {(piece.live, piece.offset): piece for piece in self.pieces}


# --- pieces -------------------------------------------------------------------------------------------------------


class _KeepViews(TorchFunctionMode):
    """Makes `contiguous()` return the view itself: transformers splits fused tensors with it when it writes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _pieces(model: nn.Module) -> list[Piece]:
    from transformers.core_model_loading import revert_weight_conversion

    blank = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state(model).items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in blank.items()}
    with _KeepViews(), torch.no_grad():
        written = revert_weight_conversion(cast(Any, model), dict(blank))
    by_live: dict[str, list[Piece]] = {name: [] for name, tensor in blank.items() if tensor.is_floating_point()}
    for name, tensor in written.items():
        live = owners.get(tensor.untyped_storage()._cdata)
        if live in by_live:
            by_live[live].append(_piece(name, live, tensor, blank[live]))
    return [piece for live, pieces in by_live.items() for piece in _whole_if_unsure(live, pieces, blank[live])]


def _piece(name: str, live: str, view: Tensor, whole: Tensor) -> Piece:
    same = view.shape == whole.shape and view.stride() == whole.stride()
    return Piece(name, live, tuple(view.shape), view.stride(), int(view.storage_offset()), same)


def _whole_if_unsure(live: str, pieces: list[Piece], tensor: Tensor) -> list[Piece]:
    """The pieces where they make up the live tensor; the live tensor itself where writing rearranges it."""
    if pieces and sum(torch.Size(piece.shape).numel() for piece in pieces) == tensor.numel():
        return pieces
    return [Piece(live, live, tuple(tensor.shape), tensor.stride(), 0, True)]


# --- layers and components ----------------------------------------------------------------------------------------


def describe(model: nn.Module) -> tuple[list[TensorInfo], int]:
    """Layer and component of every floating tensor of a live model, and the number of its decoder layers."""
    layout = Layout.of(model)
    return list(layout.infos), layout.layers


def _decoder_layers(model: Any) -> tuple[str, int]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in (decoder or model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name + ".", count
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers: this architecture is not supported")


def _by_token(model: Any) -> frozenset[str]:
    owners = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    return frozenset(
        f"{name}.{own}"
        for name, module in model.named_modules()
        if id(module) in owners
        for own, _ in module.named_parameters(recurse=False)
    )


def _place(name: str, prefix: str, layers: int, modules: Mapping[str, nn.Module], model: Any) -> tuple[int, str]:
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


def _language(model: Any) -> set[int] | None:
    """The modules of the language model, by identity, in a model that has other parts; None where there are none."""
    if model.config.get_text_config(decoder=True) is model.config:
        return None
    return {id(module) for module in (*model.get_decoder().modules(), model.get_output_embeddings())}


def _component_inside(inside: str, layer: str, modules: Mapping[str, nn.Module]) -> str:
    parts = inside.split(".")[:-1]
    chain = [(part, modules[".".join([layer, *parts[: i + 1]])]) for i, part in enumerate(parts)]
    words = [f"{part} {type(module).__name__}".lower() for part, module in chain]
    if parts and (parts[-1].endswith("gate") or any(key in words[-1] for key in ("router", "topk"))):
        return "router"
    if any("expert" in word for word in words):
        return "experts"
    return "attention" if any("attn" in word or "attention" in word for word in words) else "mlp"
