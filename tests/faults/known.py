"""The one table of failures that are known and remain, each with its reason.

A case that fails and is not here fails the harness, and so does an entry whose example fails no more.
"""

from __future__ import annotations

from faults.cases import Known

CALLS: tuple[Known, ...] = (
    Known(
        "race: rmdir case/run/scores/blocks/ID *",
        "race: rmdir case/run/scores/blocks/ID #1: denied",
        "an empty folder that could not be removed stays: nothing reads it",
    ),
)
LIMITS: tuple[Known, ...] = ()
INPUTS: tuple[Known, ...] = ()
FILES: tuple[Known, ...] = ()
