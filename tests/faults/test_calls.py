"""One call fails, anywhere in a command: it ends well, and the same command again ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import known
from faults.calls import Fault, Verb, by_name
from faults.cases import judge, thinned
from faults.injecting import MODEL, WAYS
from faults.server import Server
from faults.world import World

VERBS = ("run", "race", "merge", "export", "report", "table")
# of each verb, how many cases the short form takes, and the long one
FEW = {"run": 8, "race": 2, "merge": 4, "export": 2, "report": 2, "table": 2}
MANY = {"run": 150, "race": 60, "merge": 80, "export": 60, "report": 50, "table": 20}


def tried(name: str, server: Server, world: World, place: Path, count: int, every: bool = False) -> None:
    """`every`: each operation fails at some call in each way in which it can."""
    verb = Verb(name, server, world, place / "verb")
    faults: dict[str, Fault] = by_name(verb.faults())
    examples = {entry.example for entry in known.CALLS} & set(faults)
    chosen = thinned(faults, count, (lambda fault: faults[fault].way) if every else None) | examples
    judge((verb.tried(fault) for name, fault in faults.items() if name in chosen), known.CALLS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_calls(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, server, world, place, FEW[verb])


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", VERBS)
def test_many_calls(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, server, world, place, MANY[verb], every=True)


def test_there_is_one_of_each_kind_among_the_few() -> None:
    """A candidate's NaN is one of some thousand cases: by digests alone the long form had none."""
    names = [f"run: write case/{i} #1: {how}" for i in range(500) for how in WAYS["write"]]
    rare = [f"run: {op} model #1: {how}" for op in MODEL for how in WAYS[op]]
    few = thinned([*names, *rare], 30, lambda name: (name.split()[1], name.rpartition(": ")[2]))
    assert set(rare) <= few and len(few) == 30
    assert few == thinned([*reversed(rare), *names], 30, lambda name: (name.split()[1], name.rpartition(": ")[2]))
    assert not set(rare) & thinned([*names, *rare], 5) and len(thinned(names, 5)) == 5
