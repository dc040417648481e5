"""Workers of the real command on real models, killed at random moments: what they leave is a whole run with a winner.

tests/test_chaos.py does the same with stand-ins, on every storage. The short form: `-m slow`, the long one: `-m chaos`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from faults import world as worlds
from support.chaos import killed

from mergesearch import load_run, merge, score

WORKERS = 4
# processes that have everything imported, forked from one that does nothing else
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["mergesearch.cli", "mergesearch.commands.run", "mergesearch.commands.report", "lm_eval.tasks"]
WEIGHTS = "model.safetensors"


def work(config: str, log: str) -> None:
    """`mergesearch worker CONFIG`, with what it says in a file."""
    from mergesearch import cli

    with open(log, "a", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = ["mergesearch", "worker", config]
    os._exit(cli.status())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    world = worlds.make(tmp_path / "world")
    data = {**world.config, "output": str(tmp_path / "run"), "scoring": "lm_eval"}
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("trials", "kills", "apart"),
    [pytest.param(12, 3, 5.0, marks=pytest.mark.slow), pytest.param(200, 100, 2.0, marks=pytest.mark.chaos)],
)
def test_the_winner_is_whole(config: Path, tmp_path: Path, trials: int, kills: int, apart: float) -> None:
    data = yaml.safe_load(config.read_text())
    data["search"]["trials"] = trials
    config.write_text(yaml.safe_dump(data))
    FORKSERVER.set_forkserver_preload(PRELOADED)
    log = tmp_path / "log"

    def begin() -> BaseProcess:
        process = FORKSERVER.Process(target=work, args=(str(config), str(log)))
        process.start()
        return process

    assert killed(begin, WORKERS, kills, trials, (0.1, apart), log) == kills  # none ended before
    run = load_run(tmp_path / "run")
    records = run.records
    complete = [record for record in records if record.state == "complete"]
    # by the law that lets no candidate kill worker after worker
    assert all(str(record.error).startswith("3 workers in a row ended") for record in records if record not in complete)
    assert sum(record.strategy == "random" for record in complete) == trials
    assert sorted(record.name for record in records if record.name) == ["a", "average", "b", "base"]
    assert set(Counter(record.recipe_id for record in records).values()) == {1}
    best = run.best()
    assert best is not None
    out = merge(run.folder.best / "recipe.yaml", tmp_path / "again")
    assert (out / WEIGHTS).read_bytes() == (run.folder.best / WEIGHTS).read_bytes()
    again = score(run.folder.best, run.config)
    assert {task: one.value for task, one in again.tasks.items()} == {t: one.value for t, one in best.scores.items()}
    assert [path for path in run.folder.path.rglob(".*partial*")] == []
