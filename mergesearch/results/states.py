"""The states of a row of the table."""

from __future__ import annotations

COMPLETE, PRUNED, FAILED, RUNNING, WAITING = "complete", "pruned", "failed", "running", "waiting"
# complete, and a guard is broken
INFEASIBLE = "infeasible"
ENDED = (COMPLETE, PRUNED, FAILED)
