"""Damaged files: of a model, and of a run folder. What the commands that read them say, and what a run makes good."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from faults import oracle, trees
from faults.cases import Outcome
from faults.server import Server
from faults.world import World

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
RUN_FILES = (
    "config.yaml",
    "documents.json",
    "study.db",
    "scores/00000.npz",
    "scores/00003.npz",
    "learning/*",
    "holdout/report.json",
    "best/recipe.yaml",
    "best/model.safetensors",
    "best/config.json",
)
READERS = ("table", "report", "export", "run")
# what the study does not depend on: a run makes it anew, or does without
_OVERFLOWED = ("NaN", "infinity", "finite")


@dataclass(frozen=True)
class Damage:
    """A file, in words what happened to it, and how."""

    file: str
    words: str
    data: bytes
    verb: str = "merge"

    @property
    def name(self) -> str:
        return f"{self.verb}: {self.file}: {self.words}"


def _bytes_changed(draw: st.DrawFn, data: bytes, within: int) -> tuple[str, bytes]:
    """Damage of any file."""
    what = draw(st.sampled_from(["cut", "flip", "zeros", "insert", "empty", "longer", "noise"]))
    at = draw(st.integers(0, max(0, min(within, len(data)) - 1)))
    if what == "cut":
        return f"cut at byte {at}", data[:at]
    if what == "flip":
        bit = draw(st.integers(0, 7))
        return f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
    if what == "zeros":
        return f"zeros from byte {at}", data[:at] + bytes(len(data) - at)
    if what == "insert":
        return f"a byte put in at {at}", data[:at] + b"\xff" + data[at:]
    if what == "longer":
        return "100 bytes more", data + bytes(100)
    if what == "noise":
        return "noise", bytes((7 * n * n + 13) % 256 for n in range(2000))
    return "empty", b""


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


@st.composite
def model_damage(draw: st.DrawFn, world: World, file: str) -> Damage:
    """Damage of one file of a checkpoint."""
    if file == "model.safetensors.index.json":
        header, _ = header_of((world.path / "a" / "model.safetensors").read_bytes())
        names = [name for name in header if name != "__metadata__"]
        tree: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        if draw(st.booleans()):
            place = draw(st.sampled_from(["../b/model.safetensors", str(world.path / "b" / "model.safetensors")]))
            target = draw(st.sampled_from(names))
            changed = trees.changed(tree, ("weight_map", target), lambda holder, key: holder.__setitem__(key, place))
            words = "a tensor outside the folder, " + ("relative" if place.startswith("..") else "absolute")
            return Damage(file, words, json.dumps(changed).encode())
        mutated = draw(trees.mutations(tree))
        return Damage(file, mutated.words, json.dumps(mutated.value).encode())
    data = (world.path / "a" / file).read_bytes()
    if file == "model.safetensors":
        header, rest = header_of(data)
        if draw(st.integers(0, 3)) == 0:
            words, changed = _bytes_changed(draw, data, len(data) - len(rest))
            return Damage(file, words, changed)
        if draw(st.integers(0, 3)) == 0:
            length = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001]))
            return Damage(file, f"a header of {length} bytes", with_header(header, rest, length))
        mutated = draw(trees.mutations(header))
        return Damage(file, f"header: {mutated.words}", with_header(mutated.value, rest))
    if draw(st.integers(0, 2)) == 0:
        texts = trees.texts(data.decode())
        words = draw(st.sampled_from(sorted(texts)))
        return Damage(file, f"its text: {words}", texts[words])
    mutated = draw(trees.mutations(json.loads(data)))
    return Damage(file, mutated.words, json.dumps(mutated.value).encode())


def tried_model(damage: Damage, server: Server, world: World, folder: Path) -> Outcome:
    """Merges with the damaged model: refused in one sentence and nothing written, or merged."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "case").mkdir(parents=True)
    shutil.copytree(world.path / "a", folder / "a")
    (folder / "a" / damage.file).write_bytes(damage.data)
    recipe = {**world.recipe, "models": {**world.models, "a": str(folder / "a")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = server.run("merge", folder / "recipe.yaml", folder / "case" / "out")
    overflowed = ended.status == 1 and any(word in ended.err for word in _OVERFLOWED)
    wrong = oracle.said(ended, (0, 1, 2) if overflowed else (0, 2))
    if ended.status not in (0, 2) and not overflowed and ended.err:
        wrong.append(ended.err.strip().splitlines()[-1][:300])
    if ended.status != 0:
        wrong += [f"written: {path.name}" for path in (folder / "case").rglob("*")][:2]
    elif "outside the folder" in damage.words:
        wrong.append("a file outside the model's folder is read")
    return Outcome("files", f"a model's {damage.file}", damage.name, tuple(dict.fromkeys(wrong)), ended.status)


@st.composite
def run_damage(draw: st.DrawFn, world: World, file: str) -> Damage:
    """Damage of one file of a finished run, and which verb meets it."""
    verb = draw(st.sampled_from(READERS))
    warm = world.path / "warm"
    file = str(sorted(warm.glob(file))[0].relative_to(warm))
    data = (warm / file).read_bytes()
    loads: dict[str, Callable[[bytes], Any]] = {".json": json.loads, ".yaml": yaml.safe_load}
    load = loads.get(Path(file).suffix)
    if load is None or draw(st.integers(0, 3)) == 0:
        words, changed = _bytes_changed(draw, data, len(data))
        return Damage(file, words, changed, verb)
    if draw(st.integers(0, 3)) == 0:
        texts = trees.texts(data.decode())
        words = draw(st.sampled_from(sorted(texts)))
        return Damage(file, f"its text: {words}", texts[words], verb)
    mutated = draw(trees.mutations(load(data)))
    text = json.dumps(mutated.value) if load is json.loads else yaml.safe_dump(mutated.value, sort_keys=False)
    return Damage(file, mutated.words, text.encode(), verb)


class Runs:
    """A finished run, of which each case damages a copy."""

    def __init__(self, server: Server, world: World, folder: Path):
        self.server, self.world, self.folder = server, world, folder
        self.run = folder / "case" / "run"
        self.config = world.write("damaged.yaml", {**world.raced, "output": str(self.run)})
        self._fresh()
        again = server.run("run", self.config, state=self.run)
        assert again.status == 0, again.err
        self.expected: Any = again.state

    def _fresh(self) -> None:
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        self.run.parent.mkdir(parents=True)
        shutil.copytree(self.world.path / "warm", self.run)

    def tried(self, damage: Damage) -> Outcome:
        """Meets the damage with a verb; a run that ends well has to hold what it held."""
        self._fresh()
        (self.run / damage.file).write_bytes(damage.data)
        out = self.folder / "case" / "out"
        argv = {
            "table": ["table", self.run],
            "report": ["report", self.run],
            "export": ["export", self.run, out],
            "run": ["run", self.config],
        }[damage.verb]
        ended = self.server.run(*argv, state=self.run if damage.verb == "run" else None)
        wrong = oracle.said(ended, (0, 1, 2))
        if ended.status != 0 and out.exists():
            wrong.append("written: out")
        if damage.verb == "run" and ended.status == 0:
            # what is not needed any more need not be made again
            scores = Path(damage.file).stem if damage.file.startswith("scores/") else ""
            wrong += [f"then {problem}" for problem in oracle.different(ended.state, self.expected, but=scores)]
        return Outcome("files", f"a run's {damage.file}", damage.name, tuple(dict.fromkeys(wrong)), ended.status)
