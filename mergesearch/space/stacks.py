"""StackSpace: which parent's layer stands at each depth, how often, and how loud (a frankenmerge as a search).

Akiba et al., Evolutionary Optimization of Model Merging Recipes (2024), section 3.2, search the same: a path of layers
through the parents, with a scale where the path leaves the order in which a parent was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergesearch.config import Config, StackConfig
from mergesearch.errors import UserError
from mergesearch.recipe import BASE, Recipe, Rule, TensorInfo
from mergesearch.space.check import check_space
from mergesearch.space.groups import Group
from mergesearch.space.knobs import Suggests

# what a layer adds to the residual stream comes out of these, by architecture family
OUTPUTS = ("*.o_proj.*", "*.down_proj.*", "*.c_proj.*", "*.dense.*", "*.dense_4h_to_h.*")


class StackSpace:
    """Every stack that a run may propose: at each depth one parent's layer of that depth, `repeats` times, the layers
    passed through unchanged and so shared in memory with their parents.

    Args:
        config: the run's configuration, with `space.stack`.
        infos: the pool's tensors.
        layers: the number of decoder layers of each parent.
        label: what the study calls this space.

    Raises:
        UserError: a scale for models whose output projections are not known.
    """

    def __init__(self, config: Config, infos: Sequence[TensorInfo], layers: int, label: str = "stack"):
        check_space(config)
        self.config: Config = config
        self.layers: int = layers
        self.label: str = label
        self.stack: StackConfig = config.space.stack or StackConfig()
        self.sources: tuple[str, ...] = (*config.models, *([BASE] if self.stack.base else []))
        self.groups: list[Group] = [Group((layer, layer), "all", None) for layer in range(layers)]
        self.methods: dict[str, None] = {"passthrough": None}
        self.outputs: list[str] = [
            p for p in OUTPUTS if any(Rule(tensors=p, method="passthrough").covers(i) for i in infos)
        ]
        if self.stack.scale != (1.0, 1.0) and not self.outputs:
            raise UserError(
                "space.stack.scale: the output projections of this architecture are not known: leave scale out"
            )

    def suggest(self, trial: Suggests) -> Recipe:
        """The stack that a trial proposes; names of parameters read `layer3.model`, `layer3.repeats`."""
        stack: list[dict[str, tuple[int, int]]] = []
        scales: list[float] = []
        for layer in range(self.layers):
            source = trial.suggest_categorical(f"layer{layer}.model", list(self.sources))
            times = self._repeats(trial, layer)
            scale = self._scale(trial, layer) if times > 1 else 1.0
            stack += [{source: (layer, layer)}] * times
            scales += [scale] * times
        if not stack:  # every layer was skipped: the shallowest stack there is
            stack, scales = [{self.sources[0]: (0, 0)}], [1.0]
        return self._recipe(stack, scales)

    def _repeats(self, trial: Suggests, layer: int) -> int:
        low, high = self.stack.repeats
        return low if low == high else trial.suggest_int(f"layer{layer}.repeats", low, high)

    def _scale(self, trial: Suggests, layer: int) -> float:
        low, high = self.stack.scale
        return low if low == high else trial.suggest_float(f"layer{layer}.scale", low, high)

    def _recipe(self, stack: Sequence[dict[str, tuple[int, int]]], scales: Sequence[float]) -> Recipe:
        config = self.config
        scaled = [
            Rule(layers=(depth, depth), tensors=pattern, method="passthrough", parameters={"scale": scale})
            for depth, scale in enumerate(scales)
            if scale != 1.0
            for pattern in self.outputs
        ]
        return Recipe(
            base=config.base_model,
            models=config.models,
            rules=(*scaled, Rule(method="passthrough")),
            seed=config.search.seed,
            out_dtype=config.dtype,
            tokenizer=config.tokenizer,
            stack=tuple(stack),
        )

    def parameters(self, recipe: Recipe) -> dict[str, Any] | None:
        """The trial parameters of a stack of this space; None for every other recipe."""
        return None

    @property
    def dimension(self) -> int:
        """How many parameters the largest proposal has."""
        (low, high), (quiet, loud) = self.stack.repeats, self.stack.scale
        return self.layers * (1 + (low != high) + (quiet != loud and high > 1))
