"""Faults under every call of a small run, a merge, an export and a report: which there are, and what comes of each."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from faults import injecting, oracle
from faults.cases import Outcome
from faults.injecting import BROKEN, BUSY, DENIED, FULL, INTERRUPT, KILL, MODEL, NAN, RAISES, STORAGE, TERM, TORN, WAYS
from faults.server import Ended, Server
from faults.world import World

DEADLY = (KILL, TORN)
SIGNALLED = (TERM, INTERRUPT)
WORDS = {
    FULL: "the disk is full",
    BROKEN: "an input or output error",
    DENIED: "no permission",
    injecting.SHORT: "half is written, then the disk is full",
    TORN: "killed after half was written",
    KILL: "killed",
    TERM: "SIGTERM",
    INTERRUPT: "SIGINT",
    RAISES: "an exception",
    injecting.MEMORY: "memory runs out",
    NAN: "NaN",
    BUSY: "the storage is locked once",
    injecting.HALTED: "the storage fails from there on",
}
# parents and tasks are read alike: one of each stands for all
_ALIKE = re.compile(r" world/(base|b)/| world/(base|b)$|tiny_(?!choice)|shown\.jsonl|last\.jsonl|json-train|\.lock$")


# how often a case is tried whose call is not made: how often a soup notes how far it is goes by the clock
ATTEMPTS = 3


@dataclass(frozen=True)
class Fault:
    """One call of one verb, and how it fails."""

    verb: str
    call: str
    occurrence: int
    how: str

    @property
    def name(self) -> str:
        return f"{self.verb}: {self.call} #{self.occurrence}: {self.how}"

    @property
    def way(self) -> tuple[str, str]:
        """Which operation fails how."""
        return self.call.split()[0], self.how

    @property
    def clears(self) -> bool:
        """Whether the call clears something away, so that it stays until the next start where it fails."""
        op = self.call.split()[0]
        return op in ("remove", "rmdir") or (op in ("read", "list") and "/." in self.call)

    @property
    def kind(self) -> str:
        op = self.call.split()[0]
        place = "storage" if op in STORAGE else "model" if op in MODEL else "file"
        return f"{place} call: {WORDS[self.how]}"


class Verb:
    """A command that is disturbed: how it is made ready, run, and what it leaves."""

    def __init__(self, name: str, server: Server, world: World, folder: Path):
        self.name, self.server, self.world, self.folder = name, server, world, folder
        folder.mkdir()
        self.case = folder / "case"
        self.argv = self._argv()
        self.fresh()
        ended = self.run(count=True)
        assert ended.status == 0, ended.err
        self.expected: Any = self.result(ended)
        self.calls: list[str] = ended.calls

    @property
    def searches(self) -> bool:
        return self.name in ("run", "race")

    def _argv(self) -> list[str]:
        run, finished = str(self.case / "run"), str(self.case / "done")
        if self.searches:
            settings = self.world.config if self.name == "run" else self.world.raced
            return ["run", str(self.world.write(f"{self.name}.yaml", {**settings, "output": run}))]
        return {
            "merge": ["merge", str(self.world.path / "recipe.yaml"), str(self.case / "out")],
            "export": ["export", finished, str(self.case / "out")],
            "report": ["report", finished, "--format", "json"],
            "table": ["table", finished, "--out", str(self.case / "table.json"), "--format", "json"],
        }[self.name]

    def fresh(self) -> None:
        """A new case's folder."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        if self.name in ("export", "report", "table"):
            shutil.copytree(self.world.path / "warm", self.case / "done")

    def run(self, fault: Fault | None = None, count: bool = False, **options: Any) -> Ended:
        stated = None if fault is None else {"call": fault.call, "occurrence": fault.occurrence, "how": fault.how}
        return self.server.run(
            *self.argv,
            **options,
            fault=stated,
            count=self.case if count else None,
            roots=[self.case, self.world.path] if count or fault else [],
            state=self.case / "run" if self.searches else None,
        )

    def result(self, ended: Ended) -> Any:
        """What the command leaves, to be compared."""
        if self.searches:
            return ended.state
        out = self.case / "out"
        if out.is_dir():
            names = sorted(path.name for path in out.iterdir())
            kept = [name for name in names if name != "README.md"]  # it has the time
            return names, {name: sha256((out / name).read_bytes()).hexdigest() for name in kept}
        if self.name == "table":
            return (self.case / "table.json").read_text() if (self.case / "table.json").exists() else None
        return sorted(str(path.relative_to(self.case)) for path in self.case.rglob("*.json"))

    def faults(self) -> Iterator[Fault]:
        """Every call that can fail, with the ways in which it can."""
        for call, count in Counter(self.calls).items():
            op = call.split()[0]
            if _ALIKE.search(call) and " case/" not in call:
                continue
            first, *others = sorted({1, (count + 1) // 2, count})
            # what only writes meet
            ways = [how for how in WAYS[op] if "SELECT" not in call or how not in (FULL, BUSY, TERM)]
            yield from (Fault(self.name, call, first, how) for how in ways)
            if " world/" in call or op == "stat":
                continue
            later = {FULL, BROKEN, KILL, RAISES} if op in STORAGE or op in MODEL else {FULL, KILL, TORN}
            yield from (Fault(self.name, call, n, how) for n in others for how in ways if how in later)

    def tried(self, fault: Fault) -> Outcome:
        """Runs the verb with the fault, then once more without, and judges both."""
        for _ in range(ATTEMPTS):
            self.fresh()
            before = _names(self.case)
            ended = self.run(fault)
            if ended.fired:
                break
        wrong = [] if ended.fired else ["the call was not made"]
        if fault.how in DEADLY:
            wrong += [] if ended.status == -9 or not ended.fired else [f"status {ended.status}"]
        else:
            wrong += oracle.said(ended)
            if not fault.clears and (fault.how not in SIGNALLED or self.searches):
                wrong += oracle.left(self.case)
            if ended.status == 2 and fault.call.split()[0] not in (*STORAGE, *MODEL) and not self.searches:
                wrong += [f"written: {name}" for name in sorted(_names(self.case) - before)][:2]
        candidates = fault.call.split()[0] in MODEL and fault.how not in (*DEADLY, *SIGNALLED)
        wrong += self.again(ended, candidates)
        return Outcome("calls", fault.kind, fault.name, tuple(dict.fromkeys(wrong)), ended.status)

    def again(self, ended: Ended, candidates: bool = False) -> list[str]:
        """What is wrong once the command is run again, undisturbed.

        Args:
            ended: how it ended before.
            candidates: whether a candidate may have failed by its own fault.
        """
        again = self.run()
        wrong = [*oracle.said(again, (0, 2)), *oracle.left(self.case)]
        if again.status == 2 and not (ended.status == 0 and "exists" in again.err):
            wrong.append(again.err.strip())
        if self.searches:
            wrong += oracle.different(again.state, self.expected, candidates)
        elif self.result(again) != self.expected:
            wrong.append("another result")
        return [f"again: {problem}" for problem in wrong]


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def by_name(faults: Iterable[Fault]) -> dict[str, Fault]:
    return {fault.name: fault for fault in faults}
