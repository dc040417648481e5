"""The strategies that there are, each from a file of its own.

It stands low in the house because the configuration asks it which keys strategies add to `search`, and knows none of
them by name. A strategy's file says `@register` over its class; what a strategy is stands in `search.strategies.base`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from mergesearch.errors import unknown

# where strategies are looked for: every file of this folder is read once
PACKAGE = "mergesearch.search.strategies"


class Declared:
    """What a strategy says of itself before a run.

    Attributes:
        name: as `search.strategy` names it, and as its trials note it.
        keys: the keys that it adds to `search`: for each its type and a pydantic `Field` or a default.
        paths: which of these keys hold a path, or several: relative to the file that they stand in.
        named: whether `search.strategy` may name it; one that may not joins by itself, see `joins`.
        auto: its place among the strategies that `auto` stands for; None for one that is not among them.
        order: strategies of a lower order come first; those that `search.strategy` names have 0.
        open_ended: whether it goes on as long as the budget does; it then leaves what later ones want.
        counts: whether its trials count against `search.trials`.
        budgeted: whether it stops once the budget is used up.
    """

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, tuple[Any, Any]]] = {}
    paths: ClassVar[tuple[str, ...]] = ()
    named: ClassVar[bool] = True
    auto: ClassVar[int | None] = None
    order: ClassVar[int] = 0
    open_ended: ClassVar[bool] = False
    counts: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True

    @classmethod
    def joins(cls, search: Any) -> bool:
        """Whether it is part of a run with these settings (`SearchConfig`) without being named."""
        return False

    @classmethod
    def summary(cls) -> str:
        """What it does, in one line."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


S = TypeVar("S", bound=Declared)

_registered: dict[str, type[Declared]] = {}


def register(strategy: type[S]) -> type[S]:
    """Adds a strategy; a decorator of its class.

    Raises:
        ValueError: another class has its name, or one of its keys.
    """
    for other in _registered.values():
        if (other.__module__, other.__qualname__) == (strategy.__module__, strategy.__qualname__):
            continue
        if other.name == strategy.name:
            raise ValueError(f"strategy {strategy.name!r} of {strategy.__module__} is already in {other.__module__}")
        twice = sorted(other.keys.keys() & strategy.keys.keys())
        if twice:
            raise ValueError(f"key {twice[0]!r} of strategy {strategy.name!r} is already one of {other.name!r}")
    _registered[strategy.name] = strategy
    return strategy


def unregister(name: str) -> None:
    """Takes a strategy away again; for tests that add one."""
    _registered.pop(name, None)


def strategies() -> dict[str, type[Declared]]:
    """Every strategy by name: baselines first, then by name."""
    package = importlib.import_module(PACKAGE)
    for module in pkgutil.iter_modules(package.__path__, f"{PACKAGE}."):
        importlib.import_module(module.name)
    return dict(sorted(_registered.items(), key=lambda item: (item[1].order, item[0])))


def uncounted() -> set[str]:
    """The strategies whose trials do not count against `search.trials`."""
    return {name for name, strategy in strategies().items() if not strategy.counts}


def get(name: str, where: str) -> type[Declared]:
    """The strategy of a name.

    Raises:
        UserError: there is none.
    """
    known = strategies()
    if name not in known:
        raise unknown("strategy", name, known, where)
    return known[name]
