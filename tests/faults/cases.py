"""What a case is, how it is recorded, and which failures are known."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# where a run of the harness notes its outcomes, one a line, for `python -m scripts.bench.reliability`
RECORD = "MERGESEARCH_FAULTS_RECORD"


@dataclass(frozen=True)
class Outcome:
    """One case and what came of it.

    Attributes:
        part: `calls`, `inputs` or `files`.
        kind: what was done, in words, for the page.
        case: its name, which stays the same from run to run.
        wrong: what the oracle has against it; nothing where it is well.
        status: how the command ended.
        reason: why it remains, for what is wrong and known to be.
    """

    part: str
    kind: str
    case: str
    wrong: tuple[str, ...] = ()
    status: int | str = 0
    reason: str = ""


@dataclass(frozen=True)
class Known:
    """A failure that is known and remains for now.

    Attributes:
        pattern: of the names of its cases, as the shell's.
        example: one case that is in the short form and fails.
        reason: why it remains.
    """

    pattern: str
    example: str
    reason: str


def thinned(names: Iterable[str], count: int, kind: Callable[[str], Hashable] | None = None) -> set[str]:
    """`count` of the names, the same ones in every run: chosen by their digests.

    Args:
        kind: of a name; there is at least one of each, and more than `count` where there are more kinds.
    """
    drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    firsts = {kind(name): name for name in reversed(drawn)} if kind is not None else {}
    chosen = dict.fromkeys([*firsts.values(), *drawn])
    return set(list(chosen)[: max(count, len(firsts))])


def record(noted: Mapping[str, Any]) -> None:
    """Notes something of this run of the harness where a recording was asked for."""
    file = os.environ.get(RECORD)
    if file:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dict(noted)) + "\n")


def judge(outcomes: Iterable[Outcome], known: Sequence[Known]) -> None:
    """Fails where a case fails that is not known to, and where one that is known to does not any more.

    Each outcome is recorded as soon as it is there.
    """
    unknown, tried = [], {}
    for outcome in outcomes:
        tried[outcome.case] = outcome
        reason = next((entry.reason for entry in known if fnmatch.fnmatchcase(outcome.case, entry.pattern)), "")
        record(asdict(replace(outcome, reason=reason if outcome.wrong else "")))
        if outcome.wrong and not reason:
            unknown.append(f"{outcome.case}: {'; '.join(outcome.wrong)}")
    assert tried, "no case was tried"
    mended = [
        f"{entry.example}: does not fail any more; take its entry out of tests/faults/known.py"
        for entry in known
        if entry.example in tried and not tried[entry.example].wrong
    ]
    assert not unknown + mended, "\n".join([f"{len(unknown)} of {len(tried)} cases:", *unknown, *mended])
