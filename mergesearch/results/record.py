"""Record: what one trial of a run did and came to, as a reader sees it. Table, card and report are made of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergesearch.evaluate.expected import Expected
from mergesearch.evaluate.scores import TaskScore
from mergesearch.search import by_lm_eval
from mergesearch.search.by_lm_eval import Figures
from mergesearch.search.history import History
from mergesearch.search.objective import Objective
from mergesearch.search.strategies import of_trial
from mergesearch.search.trials import State, Trial


@dataclass(frozen=True)
class Record:
    """One row of the table.

    >>> from mergesearch import load_run
    >>> load_run("tiny").records[0].name
    'base'

    Attributes:
        number: the trial's number in the study, from 0.
        name: of a baseline (`base`, a model's name, `average`); None for what the study proposed.
        state: `complete`, `pruned`, `failed`, `running` or `waiting`; one that was scored and has no objective yet is
            running.
        objective: what the study maximises; None until the trial is complete.
        stderr: the objective's standard error, the tasks taken as independent.
        scores: each task's score by label.
        by_lm_eval: of the tasks that token tries answered in the search, the score that lm-eval's own model gives on
            the same documents; empty where it was not asked. `by_lm_eval_seconds` is what that took.
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
        method: the baseline's name, what kind of soup it is, or the methods of the recipe's rules.
        expected: what the objective is expected to be on documents that no search saw; None where that is not known.
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
    method: str = ""
    by_lm_eval: Mapping[str, TaskScore] = field(default_factory=dict)
    by_lm_eval_seconds: float | None = None
    expected: Expected | None = None

    @property
    def shown(self) -> Mapping[str, TaskScore]:
        """Each task's score as the `lm_eval` command gives it, where lm-eval's own model was asked."""
        return {**self.scores, **self.by_lm_eval}

    @property
    def worth(self) -> float | None:
        """What it is ranked by: the expected objective, the objective itself where that is not known."""
        return self.objective if self.expected is None or self.objective is None else self.expected.value

    @property
    def seconds(self) -> float | None:
        if self.merge_seconds is None or self.score_seconds is None:
            return None
        return self.merge_seconds + self.score_seconds


def ranked(records: Sequence[Record]) -> list[Record]:
    """Complete records first, those that may win before those that break a guard, the best by their worth first (by
    the objective among equals, then the earlier trial), then the others by number."""
    complete = [record for record in records if record.objective is not None]
    others = [record for record in records if record.objective is None]
    complete.sort(key=lambda r: (bool(r.infeasible), -(r.worth or 0.0), -(r.objective or 0.0), r.number))
    return complete + sorted(others, key=lambda r: r.number)


def best_single(records: Sequence[Record], models: Iterable[str]) -> Record | None:
    """The model that alone has the best objective, the earlier one among equals; None where none could be scored.

    Args:
        models: the names of the run's models. A guard may keep the best of them from winning, and it is the best.
    """
    names = set(models)
    scored = [record for record in records if record.name in names and record.objective is not None]
    return min(scored, key=lambda record: (-(record.objective or 0.0), record.number), default=None)


def record_of(
    trial: Trial,
    objective: Objective | None,
    front: bool = False,
    figures: Figures | None = None,
    expected: Expected | None = None,
) -> Record:
    """A trial as a reader sees it.

    Args:
        objective: of its run; None while the parents' scores have not fixed it.
        front: whether it is on the front of a run with one objective for each task.
        figures: what lm-eval's own model gives.
        expected: its objective on documents that no search saw.
    """
    strategy = of_trial(trial)
    known = objective if trial.state is State.COMPLETE else None
    return Record(
        number=trial.number,
        name=trial.name,
        state=(State.RUNNING if trial.state.settled and not trial.state.ended else trial.state).value,
        objective=known.ranking(trial.scores) if known else None,
        stderr=known.stderr(trial.scores) if known and trial.scores else None,
        scores=trial.scores,
        recipe=trial.recipe_data,
        recipe_id=trial.recipe_id,
        merge_seconds=trial.merge_seconds,
        score_seconds=trial.score_seconds,
        error=trial.error,
        stopped=trial.stopped,
        infeasible=known.infeasible(trial.scores) if known and trial.scores else None,
        partial=trial.partial,
        machine=trial.machine,
        front=front,
        strategy=strategy.label(trial) if trial.strategy else None,
        method=strategy.method(trial),
        by_lm_eval=figures.tasks if figures else {},
        by_lm_eval_seconds=figures.seconds if figures else None,
        expected=expected,
    )


def records(history: History, expected: Mapping[int, Expected] | None = None) -> list[Record]:
    """Every trial of a run, by number.

    Args:
        expected: what is expected of each, by number.
    """
    several = history.objective is not None and len(history.study.directions) > 1
    front = {trial.number for trial in history.study.best_trials} if several else set()
    beside, elsewhere = by_lm_eval.figures(history.study), expected or {}
    return [
        record_of(
            trial, history.objective, trial.number in front, beside.get(trial.number), elsewhere.get(trial.number)
        )
        for trial in history.trials
    ]
