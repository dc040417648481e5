"""What a run has found so far, as the strategies read it from the study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mergesearch.config import Config
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe
from mergesearch.search.objective import Objective, signed
from mergesearch.search.store import objective_of

CONTROL = "random control"


class History:
    """The trials of a study at one moment.

    Args:
        study: the study, with the objective among its attributes once the parents have fixed its scale.
        config: the run's configuration.
    """

    def __init__(self, study: optuna.Study, config: Config):
        self.study = study
        self.config = config
        self.trials: list[FrozenTrial] = study.get_trials(deepcopy=False)
        self.objective: Objective | None = objective_of(study)

    def of(self, strategy: str) -> list[FrozenTrial]:
        """The trials of one strategy that have not failed, by number."""
        return [t for t in self.trials if t.user_attrs.get("strategy") == strategy and t.state != TrialState.FAIL]

    def ended(self, strategy: str) -> list[FrozenTrial]:
        """All trials of one strategy, failed ones too."""
        return [t for t in self.trials if t.user_attrs.get("strategy") == strategy]

    def named(self, name: str) -> FrozenTrial | None:
        """The latest trial of a baseline that has not failed; else the latest that has."""
        found = [t for t in self.trials if t.user_attrs.get("name") == name]
        return next((t for t in reversed(found) if t.state != TrialState.FAIL), found[-1] if found else None)

    def scores(self, name: str) -> dict[str, TaskScore]:
        """A baseline's task scores; empty where it could not be scored."""
        trial = self.named(name)
        return scores_of(trial) if trial is not None else {}

    def signed(self, name: str) -> dict[str, float]:
        """A baseline's figures by task, turned so that more is better; empty where it could not be scored."""
        return {task: signed(score) for task, score in self.scores(name).items()}

    def value(self, trial: FrozenTrial) -> float | None:
        """The objective of a complete trial, also where the study keeps one for each task."""
        if trial.state != TrialState.COMPLETE or self.objective is None:
            return None
        return self.objective.ranking(scores_of(trial))

    def complete(self) -> list[FrozenTrial]:
        """Complete trials, the best first, the earlier one among equals."""
        done = [t for t in self.trials if t.state == TrialState.COMPLETE]
        return sorted(done, key=lambda t: (not feasible(t), -(self.value(t) or 0.0), t.number))

    def find(self, recipe: Recipe) -> FrozenTrial | None:
        """The trial that has a recipe; one that is complete where there is any."""
        found = [t for t in self.trials if t.user_attrs.get("recipe_id") == recipe.id]
        return next((t for t in found if t.state == TrialState.COMPLETE), found[-1] if found else None)

    # --- budget ---

    @property
    def proposals(self) -> int:
        """How many trials count against `search.trials`: all but baselines and the random control."""
        return sum(1 for t in self.trials if not t.user_attrs.get("name") and t.user_attrs.get("strategy") != CONTROL)

    @property
    def documents(self) -> int:
        """Document evaluations so far; a backward pass counts as two more."""
        return sum(documents_of(t.user_attrs) for t in self.trials)

    @property
    def documents_each(self) -> int:
        """The documents that a candidate is scored on; 0 while none is."""
        return sum(self.documents_of_tasks.values())

    @property
    def documents_of_tasks(self) -> dict[str, int]:
        """The documents of each task that a candidate is scored on; empty while none is."""
        found: dict[str, int] = {}
        for trial in self.trials:
            for task, score in trial.user_attrs.get("scores", {}).items():
                found[task] = max(found.get(task, 0), score["documents"])
        return found

    @property
    def hours(self) -> float:
        """Wall-clock hours in which at least one trial was at work, over all starts and workers of the run."""
        return worked_hours(self.trials)

    @property
    def spent(self) -> bool:
        """Whether one of the budgets is used up."""
        return self.spent_but(0)

    def spent_but(self, trials: int, documents: int = 0) -> bool:
        """Whether one of the budgets is used up but for what is `kept`; in hours, as long as one worker has taken for
        document evaluations so far, and no more than half of the budget."""
        budget = self.config.search
        documents = self.kept(trials, documents)
        hours = min(documents * self._hours_of_one, (budget.hours or 0.0) / 2) if documents else 0.0
        return self.proposals >= budget.trials - trials or self.used_up(documents, hours)

    def kept(self, trials: int, documents: int) -> int:
        """The document evaluations of so many trials, and so many beside; no more than half of the budget, so that what
        comes first is not left without any."""
        documents += trials * self.documents_each
        budget = self.config.search.documents
        return documents if budget is None else min(documents, budget // 2)

    @property
    def _hours_of_one(self) -> float:
        """The hours that a document evaluation takes one worker."""
        ended = [t for t in self.trials if t.datetime_complete and t.datetime_start]
        hours = sum((t.datetime_complete - _taken(t)).total_seconds() for t in ended) / 3600
        return hours / max(1, sum(documents_of(t.user_attrs) for t in ended))

    def used_up(self, documents: int = 0, hours: float = 0.0) -> bool:
        """Whether the documents or the hours of the budget are used up, with so many more than so far."""
        budget = self.config.search
        return (budget.documents is not None and self.documents + documents >= budget.documents) or (
            budget.hours is not None and self.hours + hours >= budget.hours
        )


def costs(history: History) -> list[str]:
    """What the run has cost, and what is left of its budget, in words."""
    ended = [t for t in history.trials if t.state.is_finished()]
    seconds = sum(
        (t.user_attrs.get("merge_seconds") or 0.0) + (t.user_attrs.get("score_seconds") or 0.0) for t in ended
    )
    tokens = history.study.user_attrs.get("tokens_per_document")
    spent = f"{len(ended)} trials, {history.documents:,} document evaluations"
    spent += f", {round(tokens * history.documents):,} prompt tokens" if tokens else ""
    learned = sum(t.user_attrs.get("documents_learning", 0) for t in history.trials)
    spent += f", {learned:,} of the evaluations to learn soups" if learned else ""
    lines = [f"cost: {spent}; {seconds:.0f} s merging and scoring, {history.hours:.2f} h at work"]
    return [*lines, f"left: {left}"] if (left := _left(history, seconds / max(1, len(ended)))) else lines


def _left(history: History, seconds: float) -> str:
    """What is left of each budget, and how many candidates the tightest one buys; empty once one is used up."""
    budget = history.config.search
    if history.spent:
        return ""
    each = history.documents_each or 1
    parts = {f"{budget.trials - history.proposals} trials": float(budget.trials - history.proposals)}
    if budget.documents is not None:
        rest = budget.documents - history.documents
        parts[f"{rest:,} document evaluations"] = rest / each
    if budget.hours is not None:
        parts[f"{budget.hours - history.hours:.2f} h"] = (budget.hours - history.hours) * 3600 / max(seconds, 1e-9)
    buys = max(1, round(min(parts.values())))
    return f"{', '.join(parts)}: about {buys} candidates, {buys * each:,} document evaluations, {buys * seconds:.0f} s"


def scores_of(trial: FrozenTrial) -> dict[str, TaskScore]:
    """The task scores of a trial by label."""
    return {task: TaskScore(**data) for task, data in trial.user_attrs.get("scores", {}).items()}


def recipe_of(trial: FrozenTrial) -> Recipe:
    """The recipe of a trial that has one."""
    return Recipe.from_data(trial.user_attrs["recipe"], f"trial {trial.number}")


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps every constraint of the study."""
    return all(excess <= 0 for excess in trial.constraints.values())


def documents_of(found: Mapping[str, Any]) -> int:
    """The document evaluations that a trial cost, from its attributes."""
    learning = found.get("documents_learning", 0)
    if "same_as" in found:
        return learning
    scored = found.get("scores") or found.get("partial") or {}
    return learning + sum(score["documents"] for score in scored.values())


def worked_hours(trials: Iterable[FrozenTrial]) -> float:
    """Hours in which at least one of the trials that have ended was at work."""
    spans = [
        (_taken(trial), trial.datetime_complete) for trial in trials if trial.datetime_start and trial.datetime_complete
    ]
    seconds, end = 0.0, datetime.min
    for start, stop in sorted(spans):
        seconds += max(0.0, (stop - max(start, end)).total_seconds())
        end = max(end, stop)
    return seconds / 3600


def hours_at_work(trial: FrozenTrial) -> float:
    """Hours since a worker took a trial."""
    return (datetime.now() - _taken(trial)).total_seconds() / 3600


def _taken(trial: FrozenTrial) -> datetime:
    """When the worker that ended a trial took it: one that a killed worker left was not at work in between."""
    taken = trial.user_attrs.get("taken")
    return datetime.fromisoformat(taken) if taken else trial.datetime_start
