"""The one table of failures that are known and remain, each with its reason.

A case that fails and is not here fails the harness, and so does an entry whose example fails no more.
"""

from __future__ import annotations

from faults.cases import Known

CALLS: tuple[Known, ...] = ()
LIMITS: tuple[Known, ...] = ()
INPUTS: tuple[Known, ...] = ()
FILES: tuple[Known, ...] = ()
