"""Candidates that are there already: they cost nothing, count for nothing, and end a strategy that finds no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import races
from support.searches import INFOS, Engine, Scorer, settings

from mergesearch.recipe import Recipe
from mergesearch.results.loading import load_run
from mergesearch.search.budget import Budget
from mergesearch.search.estimate import estimate
from mergesearch.search.history import MOST_EQUAL
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

KINDS = 6


class Coarse(Engine):
    """An engine by which every recipe does one of few things."""

    def identity(self, recipe: Recipe) -> str:
        return str(int(recipe.id[:8], 16) % KINDS)


def start(folder: Path, said: list[str], engine: Engine, **search: Any) -> Search:
    read = settings(folder, search=search)
    space, scorer = SearchSpace(read, INFOS, 2), Scorer(engine)
    return Search(read, RunFolder.prepare(read), space, engine, scorer, say=said.append)


@pytest.mark.parametrize("strategy", ["study", "random"])
def test_a_strategy_that_finds_nothing_new_ends_and_says_so(tmp_path: Path, strategy: str) -> None:
    said: list[str] = []
    search = start(tmp_path / "run", said, Coarse(), strategy=strategy, trials=100)
    search.run()
    history = search.history()
    mine = history.of(strategy)
    assert all(trial.same_as is not None for trial in mine[-MOST_EQUAL:])
    assert mine[-MOST_EQUAL - 1].same_as is None or len(mine) == MOST_EQUAL
    assert history.proposals == sum(trial.same_as is None for trial in mine) < 100
    new = [trial for trial in history.trials if trial.same_as is None]
    assert len(search.engine.loaded) == len(new) <= KINDS
    assert history.documents == sum(trial.documents for trial in new)
    ended = f"{strategy}: its space is exhausted: its last 20 proposals were all equal to candidates that are there"
    assert said == [f"note: {ended}"]
    words = load_run(tmp_path / "run").words
    assert f"note: {ended}" in words and not any(text.startswith("left:") for text in words)
    rest = estimate(search.config, history)
    assert rest is None or not rest.parts
    # and the same command again begins nothing
    again = start(tmp_path / "run", said, Coarse(), strategy=strategy, trials=100)
    again.run()
    assert len(again.history().trials) == len(history.trials)


def test_the_budget_is_spent_on_what_is_new(tmp_path: Path) -> None:
    class Twice(Engine):
        """By which every second recipe does what the base does."""

        def identity(self, recipe: Recipe) -> str:
            return recipe.id if int(recipe.id[:8], 16) % 2 else "base"

    search = start(tmp_path / "run", [], Twice(), trials=8, strategy="random", random_control=True)
    search.run()
    history = search.history()
    equal = [trial for trial in history.trials if trial.same_as is not None]
    assert equal and history.proposals == 8 and Budget(history).used_up
    assert history.new_of("random") == history.new_of("random_control") == 8
    assert all(trial.documents == 0 and trial.seconds == 0 for trial in equal)


def test_what_is_equal_to_a_stopped_candidate_is_not_scored_again(tmp_path: Path) -> None:
    class Again(Engine):
        """By which whatever comes once somebody was stopped is that candidate."""

        stopped: str | None = None

        def identity(self, recipe: Recipe) -> str:
            return self.stopped or recipe.id

    engine = Again()
    live = races.Live(engine)
    search = races.start(tmp_path / "run", live, trials=12)
    asked: list[int] = []

    def finished(trial: Any) -> None:
        if engine.stopped is None and trial.state is State.PRUNED:
            engine.stopped = trial.identity
            asked.append(len(live.asked))

    search._finished = search._teller._finished = finished
    search.run()
    history = search.history()
    first = next(trial for trial in history.trials if trial.state is State.PRUNED)
    after = history.trials[first.number + 1 :]
    assert len(after) == MOST_EQUAL and {trial.same_as for trial in after} == {first.number}
    assert all(t.state is State.PRUNED and t.stopped == first.stopped and not t.documents for t in after)
    assert len(live.asked) == asked[0]
