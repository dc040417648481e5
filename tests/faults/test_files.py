"""Files that are damaged: of a model, refused or harmless; of a run, said, made good or done without."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import files, known
from faults.cases import judge
from faults.generating import cases
from faults.server import Server
from faults.world import World


def tried_models(file: str, count: int, server: Server, world: World, place: Path) -> None:
    found = cases(files.model_damage(world, file), count)
    judge((files.tried_model(damage, server, world, place / "model") for damage in found), known.FILES)


def tried_runs(file: str, count: int, server: Server, world: World, place: Path) -> None:
    runs = files.Runs(server, world, place / "runs")
    judge(map(runs.tried, cases(files.run_damage(world, file), count)), known.FILES)


@pytest.mark.parametrize("file", files.MODEL_FILES)
def test_a_few_models(file: str, server: Server, world: World, place: Path) -> None:
    tried_models(file, 5, server, world, place)


@pytest.mark.parametrize("file", files.RUN_FILES)
def test_a_few_runs(file: str, server: Server, world: World, place: Path) -> None:
    tried_runs(file, 3, server, world, place)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("file", files.MODEL_FILES)
def test_many_models(file: str, server: Server, world: World, place: Path) -> None:
    tried_models(file, 40, server, world, place)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("file", files.RUN_FILES)
def test_many_runs(file: str, server: Server, world: World, place: Path) -> None:
    tried_runs(file, 20, server, world, place)
