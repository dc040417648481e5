"""The strategies of a search, one file each; a new file in this folder is enough to add one (see CONTRIBUTING.md)."""

from __future__ import annotations

from typing import cast

from mergesearch import registry
from mergesearch.config import Config
from mergesearch.search.history import History
from mergesearch.search.strategies.base import Strategy, Surroundings
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


def of_trial(trial: Trial) -> type[Strategy]:
    """The strategy that proposed a trial; one that is not there any more leaves the words that all have in common."""
    return registered().get(trial.strategy, _gone(trial.strategy))


def words(history: History) -> list[str]:
    """What the strategies of a run have to say about it."""
    known = registered()
    return [text for name in history.config.search.strategies for text in known[name].words(history)]


def _gone(strategy: str) -> type[Strategy]:
    return cast("type[Strategy]", type("Gone", (Strategy,), {"name": strategy}))


def describe() -> list[dict[str, object]]:
    """One row for each strategy: name, summary, whether `search.strategy` may name it, whether `auto` has it, whether
    it goes on until the budget ends, its keys under `search` with their defaults and meanings."""
    ...
