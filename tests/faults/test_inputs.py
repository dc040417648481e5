"""Configurations, recipes and mergekit files that are wrong somewhere: status 0 or 2, one sentence, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import inputs, known
from faults.cases import judge
from faults.generating import cases
from faults.server import Server
from faults.world import World


def tried(kind: str, count: int, server: Server, world: World, place: Path) -> None:
    found = cases(inputs.inputs(world, kind), count)
    judge((inputs.tried(given, server, world, place / "given") for given in found), known.INPUTS)


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_a_few_inputs(kind: str, server: Server, world: World, place: Path) -> None:
    tried(kind, 12, server, world, place)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_many_inputs(kind: str, server: Server, world: World, place: Path) -> None:
    tried(kind, 130, server, world, place)
