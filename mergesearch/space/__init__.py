"""What may be proposed: a trial becomes a recipe, and a recipe the trial's parameters."""

from __future__ import annotations

from typing import Any, Protocol

from mergesearch.config import Config
from mergesearch.recipe import Recipe, TensorInfo
from mergesearch.space.around import RefineSpace, TogetherSpace, split_rules
from mergesearch.space.check import check_space
from mergesearch.space.groups import Group, frozen_rules, groups_of
from mergesearch.space.knobs import Knob, Suggests
from mergesearch.space.search_space import OneMethod, SearchSpace
from mergesearch.space.stacks import StackSpace


class Space(Protocol):
    """What a study needs to propose recipes."""

    @property
    def dimension(self) -> int:
        """How many parameters the largest proposal has."""
        ...

    @property
    def label(self) -> str:
        """What the study calls it."""
        ...

    def suggest(self, trial: Suggests) -> Recipe: ...
    def parameters(self, recipe: Recipe) -> dict[str, Any] | None: ...


def space_of(config: Config, infos: list[TensorInfo], layers: int) -> Space:
    """The space that a configuration describes.

    Raises:
        UserError: as `SearchSpace` and `StackSpace` raise it.
    """
    return (StackSpace if config.space.stack else SearchSpace)(config, infos, layers)


__all__ = [
    "Group",
    "Knob",
    "OneMethod",
    "RefineSpace",
    "SearchSpace",
    "Space",
    "StackSpace",
    "Suggests",
    "TogetherSpace",
    "check_space",
    "frozen_rules",
    "groups_of",
    "space_of",
    "split_rules",
]
