"""One world and one server for the harness."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from faults.cases import record
from faults.server import Server
from faults.world import World


@pytest.fixture(scope="session", autouse=True)
def recorded() -> Iterator[None]:
    """Notes with which versions, when and how long, beside the outcomes."""
    from mergesearch.search.machine import machine

    begun = time.monotonic()
    yield
    record({"versions": machine("cpu"), "date": str(date.today()), "seconds": time.monotonic() - begun})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(scope="session")
def server(world: World) -> Iterator[Server]:
    if sys.platform != "linux":
        pytest.skip("forks that are watched and limited as Linux does it")
    world.path.mkdir()
    started = Server(world.path)
    yield started
    started.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for one test's cases."""
    return tmp_path
