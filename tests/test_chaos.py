"""Workers that are killed at random moments: nothing that was finished is lost or done twice. Long form: `-m chaos`.

The workers are processes with stand-ins for engine and scorer; what is tried is the study, its storage and the folder.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from support.chaos import check, killed, search
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


def killed_with(given: tuple[Any, ...], kills: int, seed: int, restarts: int, server: Server | None) -> int:
    """Runs and kills the workers; the server is restarted so often meanwhile, after kills drawn by the seed."""
    moments = random.Random(seed).sample(range(1, kills), restarts) if restarts else []

    def begin() -> BaseProcess:
        process = FORK.Process(target=work, args=given)
        process.start()
        return process

    def between(done: int) -> None:
        if server is not None and done in moments:
            server.stop()
            time.sleep(0.2)
            server.start()

    return killed(begin, WORKERS, kills, seed, (0.02, 0.4), given[1].with_name("faults"), between)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue(kind)
    given = tmp_path / "run", tmp_path / "log", 30, there.url if there else None
    assert killed_with(given, 6, seed=1, restarts=1 if there else 0, server=there) >= 1
    check(*given)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_kills(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    there = None if kind == "sqlite" else request.getfixturevalue(kind)
    given = tmp_path / "run", tmp_path / "log", 200, there.url if there else None
    assert killed_with(given, 100, seed=2, restarts=2 if there else 0, server=there) == 100  # none ended before
    check(*given)
