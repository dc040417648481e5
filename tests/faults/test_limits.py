"""Less memory, fewer files and smaller files than a command needs, and a model's file cut while it is merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from faults import injecting, known, oracle
from faults.calls import Verb
from faults.cases import Outcome, judge, thinned
from faults.server import Server
from faults.world import World

# bytes of memory and open files beyond what is in use already, and the largest file that may be written
LIMITS = {
    "AS": [0, 2**18, *(n * 2**20 for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96))],
    "NOFILE": [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16],
    "FSIZE": [0, 1, 100, 1000, 4000, 10_000, 30_000, 60_000, 100_000, 150_000, 200_000],
}
WORDS = {"AS": "little memory", "NOFILE": "few open files", "FSIZE": "no large files"}
VERBS = ("run", "merge")
MOMENTS = ("load world/base/model.safetensors", "read world/base/tokenizer.json", "mkdir case/.out.partial-#")


def limited(verb: Verb, name: str, value: int) -> Outcome:
    verb.fresh()
    ended = verb.run(limits={name: value})
    wrong = oracle.said(ended)
    wrong += oracle.left(verb.case)
    # a candidate that had too little memory may have failed
    wrong += verb.again(ended, candidates=name == "AS")
    return Outcome("limits", WORDS[name], f"{verb.name}: {name} {value}", tuple(dict.fromkeys(wrong)), ended.status)


def tried(name: str, few: int | None, server: Server, world: World, place: Path) -> None:
    verb = Verb(name, server, world, place / "verb")
    cases = {f"{name}: {limit} {value}": (limit, value) for limit, values in LIMITS.items() for value in values}
    chosen = set(cases) if few is None else thinned(cases, few) | {entry.example for entry in known.LIMITS}
    judge((limited(verb, *limit) for case, limit in cases.items() if case in chosen), known.LIMITS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_few_limits(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, 3, server, world, place)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("verb", VERBS)
def test_every_limit(verb: str, server: Server, world: World, place: Path) -> None:
    tried(verb, None, server, world, place)


def test_a_file_is_cut_while_it_is_merged(server: Server, world: World, place: Path) -> None:
    (place / "case").mkdir()
    recipe = {**world.recipe, "models": {**world.models, "a": str(place / "a")}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    argv, outcomes = ["merge", place / "recipe.yaml", place / "case" / "out"], []
    for call in MOMENTS:
        shutil.rmtree(place / "a", ignore_errors=True)
        shutil.copytree(world.path / "a", place / "a")
        fault = {"call": call, "occurrence": 1, "how": injecting.CUT, "victim": str(place / "a/model.safetensors")}
        ended = server.run(*argv, fault=fault, roots=[place / "case", world.path])
        wrong = [] if ended.fired else ["the call was not made"]
        wrong += oracle.said(ended, (1, 2)) + oracle.left(place / "case")
        outcomes.append(Outcome("limits", "a model's file is cut", f"merge: cut at {call}", tuple(wrong), ended.status))
    judge(outcomes, known.LIMITS)
