"""On which device each tensor lives: one device for all of them, or the parts of a model on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Devices:
    """On which device each tensor of a candidate lives, and of the parents where these are not in host memory.

    Attributes:
        main: where a candidate's inputs go, and everything that `parts` does not name.
        parts: for modules, by the beginning of their tensors' live names, another device.
    """

    main: torch.device
    parts: Mapping[str, torch.device] = field(default_factory=dict)

    def of(self, name: str) -> torch.device:
        """The device of a live tensor."""
        while name and self.parts:
            if name in self.parts:
                return self.parts[name]
            name = name.rpartition(".")[0]
        return self.main

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is where the live tensor of that name belongs."""
        there = self.of(name)
        return tensor.device.type == there.type and there.index in (None, tensor.device.index)

    @property
    def every(self) -> list[torch.device]:
        """Each device once, the main one first."""
        return list(dict.fromkeys([self.main, *self.parts.values()]))

    @property
    def map(self) -> dict[str, Any] | None:
        """As transformers takes it for `device_map`; None where one device is enough and needs no map."""
        if self.parts:
            return {name: _place(device) for name, device in self.parts.items()}
        return None if self.main.type == "cpu" else {"": _place(self.main)}

    def stacked(self, prefix: str, origins: Sequence[int]) -> Devices:
        """The devices of a stack: each layer where the layer lives that it is like.

        Args:
            prefix: what the live names of decoder layers begin with.
            origins: for each layer of the stack the parents' layer.
        """
        if not self.parts:
            return self
        parts = {name: device for name, device in self.parts.items() if not name.startswith(prefix)}
        for number, origin in enumerate(origins):
            inside = {n.removeprefix(f"{prefix}{origin}"): d for n, d in self.parts.items() if _in(n, prefix, origin)}
            parts.update({f"{prefix}{number}{rest}": device for rest, device in inside.items()})
        return Devices(self.main, parts)

    def __str__(self) -> str:
        return " and ".join(map(str, self.every))


def _place(device: torch.device) -> int | str:
    """A device as accelerate calls it: CUDA devices by number."""
    return device.index if device.type == "cuda" and device.index is not None else str(device)


def _in(name: str, prefix: str, layer: int) -> bool:
    return name == f"{prefix}{layer}" or name.startswith(f"{prefix}{layer}.")
