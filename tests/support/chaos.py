"""A run whose workers are killed: what they note as they go, and what has to be true of it in the end.

`python -m support.chaos CONFIG` is one such worker, in place of `mergesearch worker`.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mergesearch.config import read
from mergesearch.recipe import Recipe
from mergesearch.search.history import History
from mergesearch.search.storage import Patience
from mergesearch.search.trials import State
from mergesearch.search.worker import Search
from support.searches import Engine, Scorer, start


class Logging(Scorer):
    """Notes when it begins to score which recipe, in a file that survives a kill; takes 20 to 60 ms, by the recipe."""

    def __init__(self, engine: Engine, log: Path):
        super().__init__(engine)
        self.log = log

    def score(self) -> Any:
        recipe = self.engine.loaded[-1]
        line = f"{recipe.id} {datetime.now().isoformat()}\n".encode()
        with self.log.open("ab", buffering=0) as log:
            log.write(line)
        time.sleep(0.02 + 0.04 * random.Random(recipe.id).random())
        return super().score()


def search(folder: Path, log: Path, trials: int, storage: str | None) -> Search:
    engine = Engine()
    patience = Patience(120, lambda text: None, sleep=lambda seconds: time.sleep(min(seconds, 0.3)))
    changes = {"storage": storage, "search": {"trials": trials}}
    return start(folder, engine, Logging(engine, log), patience=patience, say=lambda text: None, **changes)


def check(folder: Path, log: Path, trials: int, storage: str | None) -> None:
    """Every trial there once, none left, none scored after it was settled, the best one's score what it is again."""
    last = search(folder, log, trials, storage)
    history: History = last.history()
    found = history.trials
    assert {trial.state for trial in found} == {State.COMPLETE}, Counter(trial.state for trial in found)
    assert sum(trial.strategy == "study" and trial.same_as is None for trial in found) == trials
    names = [trial.name for trial in found if trial.name]
    assert sorted(names) == ["a", "average", "b", "base"]
    begun: dict[str, list[datetime]] = {}
    for line in log.read_text().splitlines():
        recipe, moment = line.split()
        begun.setdefault(recipe, []).append(datetime.fromisoformat(moment))
    for trial in found:
        if trial.same_as is not None:
            continue
        assert trial.recipe_id is not None and trial.settled_at is not None
        assert max(begun[trial.recipe_id]) <= trial.settled_at, f"trial {trial.number} was scored again"
        assert (folder / "scores" / f"{trial.number:05d}.npz").read_text() == "documents"
    best = history.complete()[0]
    engine = Engine()
    engine.load(Recipe.from_data(dict(best.recipe_data or {}), "best"))
    again = Scorer(engine).score()
    assert {task: score.value for task, score in again.tasks.items()} == {t: s.value for t, s in best.scores.items()}


def killed(
    begin: Callable[[], BaseProcess],
    workers: int,
    kills: int,
    seed: int,
    apart: tuple[float, float],
    told: Path,
    between: Callable[[int], None] = lambda done: None,
) -> int:
    """Runs workers until all is done, killing one at a time at random moments; returns how many were killed.

    Args:
        begin: starts one, in a process of its own.
        workers: how many are at work.
        kills: how many at most.
        seed: of who and when.
        apart: seconds between two, at least and at most.
        told: where a worker says why it failed.
        between: called after each with how many there were.
    """
    rng, done = random.Random(seed), 0
    at_work = [begin() for _ in range(workers)]
    while done < kills and any(process.exitcode != 0 for process in at_work):
        time.sleep(rng.uniform(*apart))
        place = rng.randrange(workers)
        process = at_work[place]
        assert process.exitcode in (None, 0), told.read_text()
        if process.exitcode == 0:
            continue
        process.kill()
        process.join()
        done += 1
        at_work[place] = begin()
        between(done)
    for process in at_work:
        process.join(timeout=600)
    assert [process.exitcode for process in at_work] == [0] * workers, told.read_text() if told.exists() else ""
    return done


if __name__ == "__main__":
    print("begins", flush=True)
    there = read(sys.argv[1])
    search(there.folder, there.folder.with_name("log"), there.search.trials or 0, there.storage).run()
