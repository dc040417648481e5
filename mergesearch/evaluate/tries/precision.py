"""The live model in float32 for a while, as the measure of what its own dtype rounds away; and its head alone.

All tensors at once where there is room for them, else layer by layer, each only while it computes. The model's own
tensors stay where they are and come back as they were: they are put aside, not converted back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergesearch.memory import free

# of the free memory, the share that a copy in float32 may take
_SHARE = 0.5
# rows of a head that are converted at once
_ROWS = 16384
_EXACT = (torch.float32, torch.float64)
_Aside = list[tuple[Tensor, Tensor]]


def is_exact(model: Any) -> bool:
    """Whether a model computes in float32 or better by itself."""
    return model.dtype in _EXACT


@contextmanager
def in_float32(model: nn.Module, whole: bool | None = None) -> Iterator[None]:
    """Whatever the model computes until the block ends is in float32, from the values of its present weights.

    Args:
        model: any model of transformers.
        whole: all tensors at once; False: layer by layer; None: by the memory that is free.
    """
    tensors = _rounded(model)
    layers = _layers(model)
    if whole is None:
        device = tensors[0].device if tensors else torch.device("cpu")
        whole = sum(4 * tensor.numel() for tensor in tensors) <= _SHARE * free(device)
    aside: _Aside = []
    held: dict[int, _Aside] = {}
    handles = []
    in_layers = set() if whole else {id(tensor) for layer in layers for tensor in _rounded(layer)}
    try:
        aside = _widen(tensor for tensor in tensors if id(tensor) not in in_layers)
        for layer in [] if whole else layers:
            handles.append(layer.register_forward_pre_hook(_enter(held)))
            handles.append(layer.register_forward_hook(_leave(held), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for left in (aside, *held.values()):
            _restore(left)


def _rounded(module: nn.Module) -> list[Tensor]:
    """The floating tensors that are not exact, each once."""
    every = [*module.parameters(), *module.buffers()]
    return list({id(t): t for t in every if t.is_floating_point() and t.dtype not in _EXACT}.values())


def _layers(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _widen(tensors: Iterable[Tensor]) -> _Aside:
    aside: _Aside = []
    for tensor in tensors:
        aside.append((tensor, tensor.data))
        tensor.data = tensor.data.float()
    return aside


def _restore(aside: _Aside) -> None:
    while aside:
        tensor, before = aside.pop()
        tensor.data = before


def _enter(held: dict[int, _Aside]) -> Any:
    def hook(layer: nn.Module, inputs: Any) -> None:
        held[id(layer)] = _widen(_rounded(layer))

    return hook


def _leave(held: dict[int, _Aside]) -> Any:
    def hook(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        _restore(held.pop(id(layer), []))

    return hook


@contextmanager
def head_in_float32(model: Any) -> Iterator[None]:
    """Until the block ends the model's head computes and gives float32, from its present weights.

    A head that is no plain linear map stays as it is.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype in _EXACT:
        yield
        return
    # of a model that is split over devices accelerate's hook is the head's `forward`, and calls this one
    name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    before = head.__dict__.get(name)
    setattr(head, name, lambda input: _linear(head, input))  # called as the layer's own is
    try:
        yield
    finally:
        if before is None:
            delattr(head, name)
        else:
            setattr(head, name, before)


def _linear(head: nn.Linear, hidden: Tensor) -> Tensor:
    """hidden [..., width] times the head's weight [vocabulary, width], part by part: a copy of it all may be large."""
    wide = hidden.float()
    logits = torch.cat([functional.linear(wide, rows.float()) for rows in head.weight.split(_ROWS)], dim=-1)
    return logits if head.bias is None else logits + head.bias.float()
