"""Which kinds of tensors a run's models have: noted by the run, so that its page needs no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergesearch.recipe import COMPONENTS, Recipe, TensorInfo

# where a study notes it
ANATOMY = "anatomy"
_NUMBER = re.compile(r"(?<![\w])\d+(?![\w])")
_GUESSES = (
    ("norm", r"norm|\bln_|layernorm"),
    ("attention", r"attn|attention"),
    ("router", r"router|\bgate\b"),
    ("experts", r"expert"),
    ("mlp", r"mlp|feed_forward|\bfc|ffn"),
    ("embedding", r"embed|\bwte\b|\bwpe\b"),
    ("head", r"lm_head|\bhead\b"),
)


def anatomy_of(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """Which kinds of tensors a model has, small enough to be noted with the run.

    Returns:
        `layers`, their number, and `kinds`: the name with `#` for each number -> [component, layer where it is the same
        for all tensors of the kind, else None].
    """
    kinds: dict[str, list[Any]] = {}
    layers = 0
    for info in infos:
        kind, layers = _NUMBER.sub("#", info.name), max(layers, info.layer + 1)
        seen = kinds.setdefault(kind, [info.component, info.layer])
        if seen[1] != info.layer:
            seen[1] = None
    return {"layers": layers, "kinds": kinds}


def tensors_of(anatomy: Mapping[str, Any], recipe: Recipe) -> list[TensorInfo]:
    """The tensors that a recipe merges: one of each kind in each layer.

    Of a run that noted no anatomy they are what the recipe's own rules name; none where these name nothing.
    """
    if anatomy:
        found = []
        for kind, (component, layer) in anatomy["kinds"].items():
            layers = range(anatomy["layers"]) if layer is None else [layer]
            found += [TensorInfo(_numbered(kind, each), each, component, ()) for each in layers]
        return found
    named = [rule.tensors for rule in recipe.rules if rule.tensors and not re.search(r"[*?\[]", rule.tensors)]
    if named:
        return [_guessed(name) for name in named]
    layers = max((rule.layers[1] + 1 for rule in recipe.rules if rule.layers), default=0)
    there = {component for rule in recipe.rules for component in rule.components or ()}
    if not layers and not there:
        return []
    components = [component for component in COMPONENTS if component in there] or ["attention", "mlp"]
    return [TensorInfo(f"{layer}.{each}", layer, each, ()) for layer in range(max(1, layers)) for each in components]


def _numbered(kind: str, layer: int) -> str:
    """A tensor of the kind: the first number is the layer, the others, those of experts, are 0."""
    return kind.replace("#", str(layer), 1).replace("#", "0")


def _guessed(name: str) -> TensorInfo:
    number = _NUMBER.search(name)
    component = next((what for what, pattern in _GUESSES if re.search(pattern, name)), "other")
    return TensorInfo(name, int(number.group()) if number else 0, component, ())
