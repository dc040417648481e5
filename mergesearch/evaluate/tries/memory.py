"""How much is scored at once: from the memory that is free on the model's device, not from the user."""

from __future__ import annotations

from typing import Any

import torch

from mergesearch.evaluate.model import longest_pass
from mergesearch.memory import free

# Side by side up to here: on a CPU a pass is at its best with some hundred tokens, a GPU wants more of them.
_FILL = {"cpu": 384, "cuda": 4096}
_SHORTEST = 32
_ROWS = {"cpu": 64, "cuda": 256}
# Of the free memory, the share that one forward pass may take.
_SHARE = 0.25


def pack_length(model: Any) -> int:
    """The most tokens of one forward pass of a token trie."""
    room = int(_SHARE * free(model.device) / _bytes_per_token(model))
    return max(_SHORTEST, min(room, longest_pass(model.device.type)))


def fill_length(model: Any) -> int:
    """Up to how many tokens are put side by side in one forward pass."""
    return _FILL.get(model.device.type, 512)


def halved(length: int) -> int | None:
    """The next limit after passes of `length` tokens were too long; None where that would be too short."""
    return length // 2 if length // 2 >= _SHORTEST else None


def rows(model: Any, length: int) -> int:
    """How many sequences of up to `length` tokens are generated side by side, 1 or more."""
    _, width, inner, layers, size = _shape(model)
    # the cache grows by copying: twice keys and values; beside them one layer's activations
    per_token = size * (4 * layers * width + 12 * width + 4 * inner)
    room = int(_SHARE * free(model.device) / (per_token * length))
    return max(1, min(room, _ROWS.get(model.device.type, 32)))


def _bytes_per_token(model: Any) -> int:
    """A generous estimate for one forward pass: activations, keys and values, a row of logits."""
    heads, width, inner, layers, size = _shape(model)
    vocabulary = model.config.get_text_config().vocab_size
    # a thousand attention scores, where attention is not fused; the logits once more in float32
    return size * (12 * width + 4 * inner + 2 * layers * width + 1024 * heads) + (size + 8) * vocabulary


def _shape(model: Any) -> tuple[int, int, int, int, int]:
    """(heads, width, inner width, layers, bytes of a number); usual ones where the configuration does not say."""
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or 1024
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = getattr(config, "num_attention_heads", None) or 16
    layers = getattr(config, "num_hidden_layers", None) or 32
    return heads, width, inner, layers, torch.finfo(model.dtype).bits // 8
