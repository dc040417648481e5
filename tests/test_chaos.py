"""Workers that are killed at random moments: nothing that was finished is lost or done twice. Long form: `-m chaos`.

The workers are processes with stand-ins for engine and scorer; what is tried is the study, its storage and the folder.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support.postgres import Postgres, postgres
from support.searches import Engine, Scorer, start

from mergesearch.recipe import Recipe
from mergesearch.search.history import History
from mergesearch.search.storage import Patience
from mergesearch.search.trials import State
from mergesearch.search.worker import Search

server = pytest.fixture(scope="module")(postgres)
WORKERS = 4
FORK = multiprocessing.get_context("fork")


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


def work(*given: Any) -> None:
    """One worker, in a process of its own."""
    status = 1
    try:
        search(*given).run()
        status = 0
    except BaseException:
        with given[1].with_name("faults").open("a") as faults:
            traceback.print_exc(file=faults)
    finally:
        os._exit(status)


def killed(given: tuple[Any, ...], kills: int, seed: int, restarts: int, server: Postgres | None) -> int:
    """Runs the workers until all is done, killing one at a time at random moments; returns how many were killed."""
    rng, done = random.Random(seed), 0
    moments = sorted(rng.sample(range(1, kills), restarts)) if restarts else []
    at_work = [FORK.Process(target=work, args=given) for _ in range(WORKERS)]
    for process in at_work:
        process.start()
    while done < kills and any(process.exitcode != 0 for process in at_work):
        time.sleep(rng.uniform(0.02, 0.4))
        place = rng.randrange(WORKERS)
        process = at_work[place]
        assert process.exitcode in (None, 0), given[1].with_name("faults").read_text()
        if process.exitcode == 0:
            continue
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done += 1
        at_work[place] = FORK.Process(target=work, args=given)
        at_work[place].start()
        if server is not None and moments and done == moments[0]:
            moments.pop(0)
            server.stop()
            time.sleep(0.2)
            server.start()
    for process in at_work:
        process.join(timeout=600)
    assert [process.exitcode for process in at_work] == [0] * WORKERS
    return done


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


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_few_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue("server")
    given = tmp_path / "run", tmp_path / "log", 30, there.url if there else None
    assert killed(given, 6, seed=1, restarts=1 if there else 0, server=there) >= 1
    check(*given)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_hundred_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue("server")
    given = tmp_path / "run", tmp_path / "log", 200, there.url if there else None
    done = killed(given, 100, seed=2, restarts=2 if there else 0, server=there)
    print(f"{done} kills")
    check(*given)
