"""Configurations, recipes and mergekit files made of valid pieces and mutations, and what the command says of each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from faults import oracle, trees
from faults.cases import Outcome
from faults.server import Ended, Server
from faults.world import World
from mergesearch.config import Config
from mergesearch.recipe import Recipe
from mergesearch.schema import fields_of, inner_model

CONFIG, RECIPE, MERGEKIT = "configuration", "recipe", "mergekit file"
KINDS = (CONFIG, RECIPE, MERGEKIT)
# values that no number in a configuration can sensibly have
_SENSELESS = ("true", "false", "10**30", "1e308", "-1e300")
# what a candidate, not the user, did wrong
_OVERFLOWED = ("NaN", "infinity", "finite")
# one accepted configuration in so many is run as well, its budget taken away
_RUN_ONE_IN = 4


@dataclass(frozen=True)
class Input:
    """A file as it is given to the command."""

    kind: str
    words: str
    data: bytes
    senseless: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.words}"


def pieces(model: Any, at: trees.Path = ()) -> list[trees.Path]:
    """Every key that a model of the schema knows, with those of its inner models."""
    found: list[trees.Path] = []
    for name, field in fields_of(model).items():
        found.append((*at, name))
        inner = inner_model(field.annotation)
        if inner is not None and len(at) < 2 and not str(field.annotation).startswith(("list", "tuple", "dict")):
            found.extend(pieces(inner, (*at, name)))
    return found


@st.composite
def inputs(draw: st.DrawFn, world: World, kind: str) -> Input:
    """One file: one mutation or two of the data, or one of its text."""
    tree: Any = {CONFIG: world.config, RECIPE: world.recipe, MERGEKIT: world.mergekit}[kind]
    extra: list[trees.Path] = {CONFIG: pieces(Config), RECIPE: pieces(Recipe), MERGEKIT: []}[kind]
    extra = [path for path in extra if path != ("output",)]
    if draw(st.integers(0, 3)) == 0:
        text = yaml.safe_dump(tree, sort_keys=False)
        words = draw(st.sampled_from(sorted(trees.texts(text))))
        return Input(kind, f"its text: {words}", trees.texts(text)[words])
    words, senseless = [], False
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        places = tuple(path for path in extra if isinstance(tree, dict))
        mutated = draw(trees.mutations(tree, places))
        senseless |= kind == CONFIG and mutated.words in _senseless(tree)
        tree = mutated.value
        words.append(mutated.words)
        if not isinstance(tree, dict | list) or not tree:
            break
    return Input(kind, ", ".join(words), yaml.safe_dump(tree, sort_keys=False, allow_unicode=False).encode(), senseless)


def _senseless(tree: Any) -> set[str]:
    """The mutations that give a number of a configuration a value without sense, in their words."""
    found = set()
    for path in trees.paths(tree):
        value = trees.within(tree, path)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found |= {f"{trees.name_of(path)} = {word}" for word in _SENSELESS}
    return found


def tried(given: Input, server: Server, world: World, folder: Path) -> Outcome:
    """Checks the file and, as it was accepted or not, does what it says."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "case").mkdir(parents=True)
    # relative paths in a mergekit file are the caller's, so nothing stands beside it
    file = folder / "given.yaml"
    file.write_bytes(given.data)
    out = folder / "case" / "out"
    to_out = ["--set", f"output={out}"] if given.kind == CONFIG else []
    checked = server.run("check", file, *to_out, roots=[])
    wrong = _wrong(checked, folder)
    done: Ended | None = None
    if given.kind != CONFIG:
        done = server.run("merge", file, out)
    elif checked.status == 2 or _chosen(given):
        budget = [] if checked.status == 2 else ["--set", "search.trials=0", "--set", "search.strategy=baselines"]
        done = server.run("run", file, *to_out, *budget)
    if done is not None:
        wrong += [f"done: {problem}" for problem in _wrong(done, folder)]
        if checked.status == 2 and done.status == 0:
            wrong.append("check refuses what is done")
    if given.senseless and checked.status == 0:
        wrong.append("a number without sense is accepted")
    status = checked.status if done is None else done.status
    return Outcome("inputs", given.kind, given.name, tuple(dict.fromkeys(wrong)), status)


def _chosen(given: Input) -> bool:
    return sha256(given.data).digest()[0] % _RUN_ONE_IN == 0


def _wrong(ended: Ended, folder: Path) -> list[str]:
    overflowed = ended.status == 1 and any(word in ended.err for word in _OVERFLOWED)
    wrong = oracle.said(ended, (0, 1, 2) if overflowed else (0, 2))
    if ended.status not in (0, 2) and not overflowed and ended.err:
        wrong.append(ended.err.strip().splitlines()[-1][:300])
    if ended.status != 0:
        written = sorted(str(path.relative_to(folder)) for path in (folder / "case").rglob("*"))
        wrong += [f"written: {name}" for name in written[:2]]
    return wrong
