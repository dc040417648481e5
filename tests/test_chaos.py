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
from pathlib import Path
from typing import Any

import pytest
from support.chaos import check, search
from support.mariadb import mariadb
from support.postgres import postgres
from support.servers import Server

postgresql = pytest.fixture(scope="module")(postgres)
mysql = pytest.fixture(scope="module")(mariadb)
KINDS = ["sqlite", "postgresql", "mysql"]
WORKERS = 4
FORK = multiprocessing.get_context("fork")


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


def killed(given: tuple[Any, ...], kills: int, seed: int, restarts: int, server: Server | None) -> int:
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue(kind)
    given = tmp_path / "run", tmp_path / "log", 30, there.url if there else None
    assert killed(given, 6, seed=1, restarts=1 if there else 0, server=there) >= 1
    check(*given)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue(kind)
    given = tmp_path / "run", tmp_path / "log", 200, there.url if there else None
    assert killed(given, 100, seed=2, restarts=2 if there else 0, server=there) == 100  # none ended before
    check(*given)
