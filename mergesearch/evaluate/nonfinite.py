"""Where NaN and infinity come from: which of a live model's weights, or which module's output, has the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Whether a model's logits were numbers in every forward pass; greedy decoding hides NaN.

    The device is asked once, at the end.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    @property
    def found(self) -> bool:
        """Whether any were not."""
        return self._bad is not None and bool(self._bad)

    def see(self, module: nn.Module, given: Any, output: Any) -> None:
        """A forward hook of a causal language model: looks at the last position, which is what is continued."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.numel():
            bad = ~_are_numbers(logits[:, -1])
            self._bad = bad if self._bad is None else self._bad | bad.to(self._bad.device)


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """A context in which the logits of every forward pass are watched."""
    watch = Watch()
    handle = model.register_forward_hook(watch.see)
    try:
        yield watch
    finally:
        handle.remove()


def _are_numbers(logits: Tensor) -> Tensor:
    # -inf is how some models mask a part of the vocabulary
    return torch.isfinite(logits.amax(dim=-1)).all()


@torch.no_grad()
def where(model: nn.Module, forward: Callable[[Sequence[int]], Any], prompts: Iterable[Sequence[int]]) -> str:
    """Where NaN or infinity come from, in words: a weight, or the output of the first module that has them.

    Args:
        model: a causal language model.
        forward: runs it on the tokens of one sequence.
        prompts: sequences to try, one after another.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            return f"the weight {name} is not finite"
    found: list[str] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            whole = _are_numbers if module is head else lambda tensor: torch.isfinite(tensor).all()
            # what has no name is the model, whose logits may be masked by -inf
            if name and not found and not all(whole(tensor) for tensor in _floats(output)):
                found.append(name)

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        for tokens in prompts:
            forward(tokens)
            if found:
                return f"every weight is finite, and the first output that is not is that of {found[0]}"
    finally:
        for handle in handles:
            handle.remove()
    return "every weight is finite, and so are the outputs of every module on the prompts alone"


def _floats(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple | list) else [output]
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.numel()]


__all__ = ["Watch", "watching", "where"]
