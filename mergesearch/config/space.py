"""`space`: what a study may propose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from mergesearch.schema import Strict

# beyond it no weight and no scale leaves anything of a model, and arithmetic soon overflows
_LARGEST = 10_000.0
_MOST_REPEATS = 64


def _as_range(value: Any) -> Any:
    """A single number is a range of one value: the parameter is fixed, not searched."""
    if isinstance(value, (list, tuple)) and any(isinstance(end, bool) for end in value):
        raise ValueError(f"{list(value)} holds true or false: give two numbers")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value, value)
    return value


Range = Annotated[tuple[float, float], BeforeValidator(_as_range)]


class Selector(Strict):
    """Some of the tensors: what `layers` and `components` both select; left out, each selects everything."""

    layers: tuple[int, int] | None = Field(default=None, description="first and last layer, both included")
    components: list[str] | None = Field(default=None, description="`attention`, `mlp` and so on, as in `space`")


class Freeze(Selector):
    """Tensors that the search leaves as one of its parents has them."""

    at: str = Field(default="base", description="`base`, `average` or a model's name")


class Narrow(Selector):
    """Ranges of their own for some of the tensors: further keys are method parameters, as in `space`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Narrow:
        _check_ranges(self.ranges())
        return self

    def ranges(self) -> dict[str, tuple[float, float]]:
        return _ranges(self.model_extra or {})


class StackConfig(Strict):
    """The search for a stack: which model's layer stands at each depth, how often, and how loud."""

    repeats: tuple[int, int] = Field(
        default=(1, 2), description="the fewest and the most times a layer is there; 0 skips it"
    )
    scale: Range = Field(default=(1.0, 1.0), description="of what a repeated layer adds to the residual stream")
    base: bool = Field(default=True, description="whether the base's layers may be taken too")

    @model_validator(mode="after")
    def _in_order(self) -> StackConfig:
        low, high = self.repeats
        if not 0 <= low <= high or not 1 <= high <= _MOST_REPEATS:
            raise ValueError(
                f"repeats: [{low}, {high}]: give the fewest and the most, at most {_MOST_REPEATS}, as in [1, 2]"
            )
        _check_ranges({"scale": self.scale})
        return self


class SpaceConfig(Strict):
    """What the study may propose. Further keys are ranges of method parameters: `t: [0.2, 0.8]`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    methods: list[str] = Field(
        default=["linear", "task_arithmetic", "ties", "dare_ties"],
        min_length=1,
        description="the merge methods to choose from, see `mergesearch methods`",
    )
    layer_groups: int = Field(
        default=1,
        ge=1,
        description="consecutive ranges of layers with parameters of their own; the embedding belongs to the first, "
        "the final norm and the head to the last",
    )
    components: list[str] = Field(
        default=["all"],
        min_length=1,
        description="each group of layers splits into these: `attention`, `mlp`, `norm`, `embedding`, `head`, "
        "`router`, `experts`; `other`: all that is not named; `[all]`: no split; vision and audio towers stay the "
        "base's where `tower` is not named",
    )
    method_per: Literal["recipe", "group"] = Field(
        default="recipe", description="one method for the whole recipe, or one for each group"
    )
    depth: Literal["groups", "control_points", "split"] = Field(
        default="groups",
        description="how parameters vary over depth. `groups`: by `layer_groups`; `control_points`: stated at a few "
        "depths and interpolated between them; `split`: one mix up to a layer that is searched, another above it",
    )
    control_points: int = Field(default=3, ge=2, le=1000, description="how many, first and last layer included")
    freeze: list[Freeze] = Field(
        default=[],
        description="`[{layers: [0, 3], components: [norm], at: base}]`: tensors that the study and the learned soups "
        "leave as they are in the base, the average or a model",
    )
    ranges_for: list[Narrow] = Field(
        default=[],
        description="`[{components: [attention], weight: [0.2, 0.6]}]`: ranges of their own for whole groups",
    )
    grow: bool = Field(
        default=False,
        description="begin with one group for the whole model, then refine every group of the best recipe",
    )
    stack: StackConfig | None = Field(
        default=None,
        description="`{repeats: [1, 2], scale: [0.5, 1.0], base: true}`: search a stack of layers instead of merging "
        "tensors",
    )
    weight: Range | None = Field(default=None, description="range of each model's weight; one number fixes it")
    density: Range | None = Field(default=None, description="range of the share of each task vector that is kept")
    lam: Range | None = Field(default=None, alias="lambda", description="range of the scale of the merged task vector")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> SpaceConfig:
        _check_ranges(self.ranges())
        return self

    @field_validator("methods", "components")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = next((v for v in value if value.count(v) > 1), None)
        if twice:
            raise ValueError(f"{twice!r} is listed twice: name it once")
        return value

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Every range that the file gives, by the parameter's YAML name; `space.py` refuses what is no parameter."""
        named = {"weight": self.weight, "density": self.density, "lambda": self.lam}
        return {**{key: value for key, value in named.items() if value is not None}, **_ranges(self.model_extra or {})}


def _check_ranges(ranges: Mapping[str, tuple[float, float]]) -> None:
    for key, (low, high) in ranges.items():
        if low > high:
            raise ValueError(f"{key}: [{low}, {high}]: the first number must not exceed the second")
        if max(abs(low), abs(high)) > _LARGEST:  # not so of NaN, which says that it is no range
            raise ValueError(
                f"{key}: [{low}, {high}]: no model is left beyond {_LARGEST:,.0f}: narrow it, as in [0.5, 1.5]"
            )


def _ranges(extra: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    ranges = {}
    for key, value in extra.items():
        value = _as_range(value)
        if not (
            isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
        ):
            # a misspelt key of another kind: space.py names the nearest valid one
            value = (float("nan"), float("nan"))
        ranges[key] = (value[0], value[1])
    return ranges
