"""Groups of tensors: consecutive layers x components, and which of them a configuration leaves alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergesearch.config import Freeze, Selector, SpaceConfig
from mergesearch.errors import UserError, unknown
from mergesearch.recipe import AVERAGE, BASE, COMPONENTS, Rule, TensorInfo

DERIVED = ("all", "other")
Members = tuple[str, ...] | None


@dataclass(frozen=True)
class Group:
    """The tensors that share parameters: consecutive layers x components (None: every component)."""

    layers: tuple[int, int]
    component: str
    members: Members

    @property
    def label(self) -> str:
        """`layers0-1.attention`; without the component where it is not split."""
        return _joined(f"layers{self.layers[0]}-{self.layers[1]}", self.component)

    def rule(self, method: str, models: Sequence[str], parameters: Mapping[str, Any]) -> Rule:
        return Rule(
            layers=self.layers,
            components=self.members,
            method=method,
            models=tuple(models),
            parameters=dict(parameters),
        )

    def covers(self, info: TensorInfo) -> bool:
        """Whether the tensor belongs to the group."""
        return self.layers[0] <= info.layer <= self.layers[1] and (
            self.members is None or info.component in self.members
        )


def _joined(depth: str, component: str) -> str:
    return depth if component == "all" else f"{depth}.{component}"


def component_label(depth: str, component: str) -> str:
    """The name of a place in the space: `depth0.attention`, or `depth0` where components are not told apart."""
    return _joined(depth, component)


def groups_of(
    infos: Sequence[TensorInfo], layers: int, count: int, components: Sequence[str], where: str = "space"
) -> list[Group]:
    """The groups of `count` ranges of layers x components that have tensors.

    Args:
        where: whose components these are, for errors.

    Raises:
        UserError: more ranges than layers, components that leave tensors uncovered.
    """
    if count > layers:
        raise UserError(f"{where}.layer_groups is {count}, but the models have {layers} layers: use at most that")
    members = component_members(components, infos, where)
    groups = [Group(span, name, names) for span in spans(layers, count) for name, names in members.items()]
    return [group for group in groups if any(group.covers(info) for info in infos)]


def spans(layers: int, count: int) -> list[tuple[int, int]]:
    """`count` consecutive ranges of layers, of equal length give or take one."""
    edges = [round(i * layers / count) for i in range(count + 1)]
    return [(a, b - 1) for a, b in itertools.pairwise(edges)]


def check_components(wanted: Sequence[str], where: str = "space") -> None:
    """`UserError` for a component that there is not."""
    for name in wanted:
        if name not in (*COMPONENTS, *DERIVED):
            raise unknown("component", name, (*COMPONENTS, *DERIVED), f"{where}.components")
    if "all" in wanted and len(wanted) > 1:
        raise UserError(f"{where}.components: 'all' stands alone: name components and other, or all")


def component_members(wanted: Sequence[str], infos: Sequence[TensorInfo], where: str = "space") -> dict[str, Members]:
    """The components that each of the wanted ones stands for.

    Raises:
        UserError: tensors of a component that none of them covers.
    """
    if list(wanted) == ["all"]:
        return {"all": None}
    rest = tuple(name for name in sorted({info.component for info in infos}) if name not in wanted)
    if rest and "other" not in wanted:
        raise UserError(f"{where}.components covers no {', '.join(rest)}: add them, or add other")
    members = {name: rest if name == "other" else (name,) for name in wanted}
    return {name: names for name, names in members.items() if names}


# --- selectors ----------------------------------------------------------------------------------------------------


def check_selectors(space: SpaceConfig, models: Sequence[str]) -> None:
    """What can be said against `freeze` and `ranges_for` before any model is read."""
    for key, selectors in (("freeze", space.freeze), ("ranges_for", space.ranges_for)):
        for position, selector in enumerate(selectors):
            for name in selector.components or ():
                if name not in COMPONENTS:
                    raise unknown("component", name, COMPONENTS, f"space.{key}.{position}")
    for position, frozen in enumerate(space.freeze):
        if frozen.at not in (BASE, AVERAGE, *models):
            raise unknown("parent", frozen.at, (BASE, AVERAGE, *models), f"space.freeze.{position}.at")


def check_layers(space: SpaceConfig, layers: int) -> None:
    """`UserError` where a selector names layers that the models do not have."""
    for key, selectors in (("freeze", space.freeze), ("ranges_for", space.ranges_for)):
        for position, selector in enumerate(selectors):
            if selector.layers and not 0 <= selector.layers[0] <= selector.layers[1] < layers:
                raise UserError(
                    f"space.{key}.{position}.layers is {list(selector.layers)}, but the models have layers 0 to "
                    f"{layers - 1}: give the first and the last, both included"
                )


def selects(selector: Selector, info: TensorInfo) -> bool:
    """Whether a tensor is among those that a selector selects."""
    inside = selector.layers is None or selector.layers[0] <= info.layer <= selector.layers[1]
    return inside and (selector.components is None or info.component in selector.components)


def frozen_rules(space: SpaceConfig, models: Sequence[str]) -> list[Rule]:
    """The rules that leave the frozen tensors as a parent has them; they stand before all others."""
    return [_frozen(each, models) for each in space.freeze]


def _frozen(frozen: Freeze, models: Sequence[str]) -> Rule:
    components = tuple(frozen.components) if frozen.components else None
    if frozen.at == BASE:
        method, parameters = "task_arithmetic", {"weight": 0.0}
    elif frozen.at == AVERAGE:
        method, parameters = "linear", {"weight": 1.0}
    else:
        method, parameters = "linear", {"weight": {name: float(name == frozen.at) for name in models}}
    return Rule(layers=frozen.layers, components=components, method=method, parameters=parameters)
