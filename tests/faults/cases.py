"""What a case is, how it is recorded, and which failures are known."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """

    part: str
    kind: str
    case: str
    wrong: tuple[str, ...] = ()
    status: int | str = 0


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


def thinned(names: Iterable[str], count: int) -> set[str]:
    """`count` of the names, the same ones in every run: chosen by their digests."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])


def record(outcome: Outcome) -> None:
    """Notes an outcome where a recording was asked for."""
    file = os.environ.get(RECORD)
    if file:
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(outcome)) + "\n")


def judge(outcomes: Sequence[Outcome], known: Sequence[Known]) -> None:
    """Fails where a case fails that is not known to, and where one that is known to does not any more."""
    assert outcomes, "no case was tried"
    unknown = []
    for outcome in outcomes:
        record(outcome)
        if outcome.wrong and not any(fnmatch.fnmatchcase(outcome.case, entry.pattern) for entry in known):
            unknown.append(f"{outcome.case}: {'; '.join(outcome.wrong)}")
    tried = {outcome.case: outcome for outcome in outcomes}
    mended = [
        f"{entry.example}: does not fail any more; take its entry out of tests/faults/known.py"
        for entry in known
        if entry.example in tried and not tried[entry.example].wrong
    ]
    assert not unknown + mended, "\n".join([f"{len(unknown)} of {len(outcomes)} cases:", *unknown, *mended])
