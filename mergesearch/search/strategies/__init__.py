"""The strategies of a search, one file each; a new file in this folder is enough to add one (see CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic.fields import FieldInfo

from mergesearch import registry
from mergesearch.config import Config, SearchConfig
from mergesearch.schema import Strict, words_of_type
from mergesearch.search import standstill
from mergesearch.search.history import MOST_EQUAL, History
from mergesearch.search.strategies.base import Measures, Strategy, Surroundings, gone
from mergesearch.search.trials import Trial


def registered() -> dict[str, type[Strategy]]:
    """Every strategy by name."""
    return cast("dict[str, type[Strategy]]", registry.strategies())


def strategies_of(run: Surroundings) -> list[Strategy]:
    """The strategies of a run, in order."""
    known = registered()
    return [known[name](run) for name in run.config.search.strategies]


def refuse(config: Config) -> None:
    """Lets each strategy of a configuration look at what it needs.

    Raises:
        UserError: what keeps one from working.
    """
    known = registered()
    for name in config.search.strategies:
        known[name].refuse(config)


def measuring(config: Config) -> dict[str, Measures]:
    """What the strategies of a configuration measure of the models on documents, by their names."""
    known = registered()
    found = {name: known[name].measures() for name in config.search.strategies}
    return {name: measures for name, measures in found.items() if measures is not None}


def of_trial(trial: Trial) -> type[Strategy]:
    """The strategy that proposed a trial; one that is not there any more leaves the words that all have in common."""
    return registered().get(trial.strategy) or gone(trial.strategy)


def words(history: History) -> list[str]:
    """What the strategies of a run have to say about it."""
    known = registered()
    names = history.config.search.strategies
    ended = [exhausted(name) for name in names if history.is_exhausted(name)]
    return [*(text for name in names for text in known[name].words(history)), *ended, *standstill.words(history)]


def exhausted(strategy: str) -> str:
    """That a strategy has ended since it finds nothing new, in words."""
    name = strategy.replace("_", " ")
    return (
        f"{name}: its space is exhausted: its last {MOST_EQUAL} proposals were all equal to candidates that are there"
    )


def describe() -> list[dict[str, Any]]:
    """One row for each strategy: name, summary, whether `search.strategy` may name it, whether it is part of `auto`,
    whether it goes on until the budget ends, and its keys under `search`: key, type, default, meaning."""
    further = SearchConfig.further().model_fields
    return [
        {
            "name": name,
            "summary": strategy.summary(),
            "named": strategy.named,
            "auto": strategy.auto is not None,
            "open_ended": strategy.open_ended,
            "keys": [row for key in strategy.keys for row in _keys(f"search.{key}", further[key])],
        }
        for name, strategy in registered().items()
    ]


def _keys(path: str, field: FieldInfo) -> Iterator[dict[str, Any]]:
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Strict):
        for name, inner in kind.model_fields.items():
            yield from _keys(f"{path}.{inner.alias or name}", inner)
        return
    default = field.get_default(call_default_factory=True, validated_data={})
    yield {"key": path, "allowed": words_of_type(field), "default": default, "meaning": field.description or ""}
