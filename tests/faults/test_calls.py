"""One call fails, anywhere in a command: it ends well, and the same command again ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults import known
from faults.calls import Fault, Verb, by_name
from faults.cases import judge, thinned
from faults.server import Server
from faults.world import World

VERBS = ("run", "race", "merge", "export", "report", "table")
# of each verb, how many cases the short form takes, and the long one
FEW = {"run": 8, "race": 2, "merge": 4, "export": 2, "report": 2, "table": 2}
MANY = {"run": 150, "race": 60, "merge": 80, "export": 60, "report": 50, "table": 20}


def tried(name: str, server: Server, world: World, place: Path, count: int) -> None:
    verb = Verb(name, server, world, place / "verb")
    faults: dict[str, Fault] = by_name(verb.faults())
    examples = {entry.example for entry in known.CALLS} & set(faults)
    chosen = thinned(faults, count) | examples
    judge((verb.tried(fault) for name, fault in faults.items() if name in chosen), known.CALLS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_calls(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, server, world, place, FEW[verb])


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", VERBS)
def test_many_calls(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, server, world, place, MANY[verb])
