"""Record: what one trial of a run did and found, as plain data. The table, the card and the report read these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesearch.evaluate.scores import TaskScore

# what these strategies make is known by their names
SOUPS = ("greedy soup", "learned soup", "fisher", "regmean")


@dataclass(frozen=True)
class Record:
    """One row of the table.

    Attributes:
        number: the trial's number in the study, from 0.
        name: of a baseline (`base`, a model's name, `average`); None for what the study proposed.
        state: `complete`, `pruned`, `failed`, `running` or `waiting`.
        objective: what the study maximises; None until the trial is complete.
        stderr: the objective's standard error, the tasks taken as independent.
        scores: each task's score by label.
        recipe: the recipe as plain data; None until it is proposed.
        merge_seconds, score_seconds: what building and scoring the candidate took.
        error: why it failed.
        stopped: for one that was pruned, after how many documents and how far behind.
        infeasible: why a complete one may not win: the guard that it breaks.
        partial: for one that was pruned, each task's score on the documents so far.
        machine: device and library versions.
        front: of a run with one objective for each task, whether no other candidate is at least as good on every task
            and better on one.
        strategy: who proposed it, in words: `study`, `greedy soup`, `learned soup per group`.
    """

    number: int
    name: str | None
    state: str
    objective: float | None = None
    stderr: float | None = None
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    recipe_id: str | None = None
    merge_seconds: float | None = None
    score_seconds: float | None = None
    error: str | None = None
    stopped: str | None = None
    infeasible: str | None = None
    partial: Mapping[str, TaskScore] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    front: bool = False
    strategy: str | None = None

    @property
    def method(self) -> str:
        """The baseline's name, what kind of soup it is, or the methods of the recipe's rules."""
        if self.name:
            return self.name
        if self.strategy and self.strategy.startswith(SOUPS):
            return self.strategy
        rules: Sequence[Mapping[str, Any]] = (self.recipe or {}).get("rules", ())
        return "+".join(dict.fromkeys(rule["method"] for rule in rules))

    @property
    def seconds(self) -> float | None:
        if self.merge_seconds is None or self.score_seconds is None:
            return None
        return self.merge_seconds + self.score_seconds


def ranked(records: Sequence[Record]) -> list[Record]:
    """Complete records first, those that may win before those that break a guard, best objective first (earlier trial
    first among equals), then the others by number."""
    complete = [record for record in records if record.objective is not None]
    others = [record for record in records if record.objective is None]
    complete.sort(key=lambda r: (bool(r.infeasible), -(r.objective or 0.0), r.number))
    return complete + sorted(others, key=lambda r: r.number)
