"""Layer stacking: the configuration of a model whose layers are taken from the layers of another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mergesearch.errors import UserError

# transformers' lists of layer numbers; every other list as long as the layers has one entry for each
_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "rope_scaling_layers", "kv_source_layers")
_NO_LAYERS = ("_token_id", "_token_ids", "_ids", "_section", "_sections", "architectures")


def stacked_config(config: Any, origins: Sequence[int]) -> Any:
    """A copy of a transformers configuration with `len(origins)` layers, layer r being what layer origins[r] was.

    The layer count follows, lists with one entry for each layer (`layer_types`) and lists of layer numbers
    (`mlp_only_layers`) are taken along.

    Raises:
        UserError: transformers refuses the result.
    """
    stacked = copy.deepcopy(config)
    inner = stacked.get_text_config(decoder=True)
    count = inner.num_hidden_layers
    changes = {key: _follow(key, value, count, origins) for key, value in vars(inner).items()}
    vars(inner).update({key: value for key, value in changes.items() if value is not None})
    inner.num_hidden_layers = len(origins)
    try:
        return type(stacked).from_dict(stacked.to_dict())
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers refuses a {stacked.model_type} with layers {list(origins)}: {reason}") from None


def _follow(key: str, value: Any, count: int, origins: Sequence[int]) -> list[Any] | None:
    """A list of the configuration as it stands after stacking; None where the layers do not concern it."""
    if not isinstance(value, (list, tuple)) or key.endswith(_NO_LAYERS):
        return None
    if key in _NUMBERS:
        return [position for position, origin in enumerate(origins) if origin in value]
    return [value[origin] for origin in origins] if len(value) == count else None
