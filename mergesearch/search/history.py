"""What a run has done so far, as the strategies read it from the study."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import optuna

from mergesearch import registry
from mergesearch.config import Config
from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe
from mergesearch.search import trials
from mergesearch.search.objective import Objective, signed
from mergesearch.search.store import all_noted, objective_of
from mergesearch.search.trials import HANDED_BACK, Kind, State, Trial

# after so many proposals in a row that were there already, a strategy that goes on for ever has nothing new to propose
MOST_EQUAL = 20
# so many trials, the latest, say how many workers there are: after a restart it may be fewer
LATEST = 100
# where the study notes what the run's end will take: `seconds`, and `words` that say what for
ROOM = "room"


class History:
    """The trials of a study at one moment.

    Args:
        study: the study, with the objective noted once the parents have fixed its scale.
        config: the run's configuration.
        before: an earlier history of the same study: trials that had ended then are not read again.
    """

    def __init__(self, study: optuna.Study, config: Config, before: History | None = None):
        self.study = study
        self.config = config
        known = {} if before is None else {trial.number: trial for trial in before.trials if trial.state.ended}
        frozen = study.get_trials(deepcopy=False)
        self.trials: list[Trial] = [known.get(trial.number) or trials.read(trial) for trial in frozen]
        self.objective: Objective | None = objective_of(study)

    def at(self, moment: datetime) -> History:
        """The run as it was at a moment, local time, as far as its trials tell: what was noted of the whole run stays.

        What a trial under way had learned by then is not known any more.
        """
        past = copy.copy(self)
        past.__dict__.pop("documents_of_tasks", None)
        past.trials = [trial for each in self.trials if (trial := _at(each, moment)) is not None]
        if not any(trial.state is State.COMPLETE for trial in past.trials):
            past.objective = None
        return past

    @cached_property
    def notes(self) -> Mapping[str, Any]:
        """What was noted of the whole run by now, by its key."""
        return all_noted(self.study)

    # --- which trials ---

    def of(self, strategy: str) -> list[Trial]:
        """All trials of one strategy, by number."""
        return [trial for trial in self.trials if trial.strategy == strategy]

    def named(self, name: str) -> Trial | None:
        """The latest trial of a baseline that has not failed; else the latest that has."""
        mine = [trial for trial in self.trials if trial.name == name]
        return next((t for t in reversed(mine) if t.state is not State.FAILED), mine[-1] if mine else None)

    def complete(self) -> list[Trial]:
        """Complete trials: those that keep every guard first, the best first, the earlier one among equals."""
        done = [trial for trial in self.trials if trial.state is State.COMPLETE]
        return sorted(done, key=lambda trial: (not trial.feasible, -(self.value(trial) or 0.0), trial.number))

    def find(self, recipe: Recipe) -> Trial | None:
        """The trial that has a recipe; one that is complete where there is any."""
        same = [trial for trial in self.trials if trial.recipe_id == recipe.id]
        return next((trial for trial in same if trial.state is State.COMPLETE), same[-1] if same else None)

    # --- scores ---

    def scores(self, name: str) -> dict[str, TaskScore]:
        """A baseline's task scores; empty where it could not be scored."""
        trial = self.named(name)
        return dict(trial.scores) if trial is not None else {}

    def signed(self, name: str) -> dict[str, float]:
        """A baseline's figures by task, turned so that more is better; empty where it could not be scored."""
        return {task: signed(score) for task, score in self.scores(name).items()}

    def value(self, trial: Trial) -> float | None:
        """The objective of a complete trial, also where the study keeps one for each task."""
        if trial.state is not State.COMPLETE or self.objective is None:
            return None
        return self.objective.ranking(trial.scores)

    # --- what was spent ---

    @property
    def proposals(self) -> int:
        """How many trials count against `search.trials`: those that were not there already."""
        uncounted = registry.uncounted()
        return sum(1 for trial in self.trials if trial.same_as is None and trial.strategy not in uncounted)

    def new_of(self, strategy: str) -> int:
        """How many trials of one strategy were not there already."""
        return sum(1 for trial in self.of(strategy) if trial.same_as is None)

    def is_exhausted(self, strategy: str, stage: str | None = None) -> bool:
        """Whether a strategy that would go on for ever had its last `MOST_EQUAL` trials all there already.

        Args:
            stage: only of its trials in this stage; None: in that of its last trial.
        """
        mine = self.of(strategy)
        if not mine:
            return False
        stage = mine[-1].key.get("stage") if stage is None else stage
        last = [trial for trial in mine if trial.key.get("stage") == stage and trial.state.settled][-MOST_EQUAL:]
        if len(last) < MOST_EQUAL or any(trial.same_as is None for trial in last):
            return False
        known = registry.strategies().get(strategy)
        return (known is not None and known.open_ended) or any(trial.kind is Kind.SAMPLED for trial in last)

    @property
    def documents(self) -> int:
        """Document evaluations so far; a backward pass counts as two more."""
        return sum(trial.documents for trial in self.trials)

    @property
    def documents_each(self) -> int:
        """The documents that a candidate is scored on; 0 while none is."""
        return sum(self.documents_of_tasks.values())

    @cached_property
    def documents_of_tasks(self) -> dict[str, int]:
        """The documents of each task that a candidate is scored on; empty while none is."""
        most: dict[str, int] = {}
        for trial in self.trials:
            for task, score in trial.scores.items():
                most[task] = max(most.get(task, 0), score.documents)
        return most

    @property
    def hours(self) -> float:
        """Wall-clock hours in which at least one worker was at a trial that is settled by now, or that it left, over
        all starts and workers of the run."""
        over = [trial.state.settled or trial.worker == HANDED_BACK for trial in self.trials]
        each = (spans(trial) if done else trial.earlier for trial, done in zip(self.trials, over, strict=True))
        return worked_hours(chain.from_iterable(each))

    def hours_with(self, number: int | None, now: datetime | None = None) -> float:
        """The same with what is under way: a trial of which the caller knows that a worker has been at it since it took
        it. Time in which other workers were at work too counts once.

        Args:
            number: of that trial; None: of none.
            now: local time; by default that of this host's clock.
        """
        there = [span for trial in self.trials for span in spans(trial)]
        trial = None if number is None else self.trials[number]
        start = None if trial is None else trial.taken or trial.begun_at
        return worked_hours(there if start is None else [*there, (start, now or datetime.now())])

    @property
    def hours_kept(self) -> float:
        """Hours of `search.hours` that are kept back for the report, where the run ends with it; at most half."""
        hours = self.config.search.hours
        noted = self.notes.get(ROOM) if hours is not None and self.config.report.at_end else None
        return min(noted["seconds"] / 3600, hours / 2) if noted and hours is not None else 0.0

    @property
    def hours_to_search(self) -> float | None:
        """Hours that the search may take: `search.hours` without what is kept back; None where there is no end."""
        return None if self.config.search.hours is None else self.config.search.hours - self.hours_kept

    @property
    def workers(self) -> int:
        """How many workers the run has: the most that were at trials at one moment, of late; 1 before any was.

        Ids would count a worker that was started again twice.
        """
        moments: list[tuple[datetime, int]] = []
        for trial in self.trials[-LATEST:]:
            start, end = trial.taken or trial.begun_at, settled_at(trial)
            if start is None or trial.worker == HANDED_BACK or (end is not None and end <= start):
                continue
            moments += [(start, 1), (end or datetime.max, -1)]
        # of one moment those that end come first
        return max(1, *accumulate((change for _, change in sorted(moments)), initial=0))

    @property
    def hours_of_a_document(self) -> float:
        """The hours that a document evaluation takes one worker."""
        settled = [trial for trial in self.trials if trial.state.settled]
        seconds = sum((end - start).total_seconds() for trial in settled for start, end in spans(trial))
        return seconds / 3600 / max(1, sum(trial.documents for trial in settled))


def settled_at(trial: Trial) -> datetime | None:
    """When a trial was scored, stopped or given up, local time; None for one that is under way."""
    if not trial.state.settled:
        return None
    start = trial.taken or trial.begun_at
    if trial.settled_at is not None or start is None or trial.state is State.FAILED:
        return trial.settled_at or trial.ended_at
    if trial.learning_documents and trial.learning_seconds is None:
        return trial.ended_at
    # of a version that did not note it: the parents end together, once the last of them is scored
    return start + timedelta(seconds=trial.seconds + (trial.learning_seconds or 0.0))


def _at(trial: Trial, moment: datetime) -> Trial | None:
    start, settled = trial.begun_at, settled_at(trial)
    if start is None or start > moment:
        return None
    if settled is not None and settled <= moment:
        if trial.ended_at is None or trial.ended_at <= moment:
            return trial
        return replace(trial, state=State.STOPPED if trial.stopped is not None else State.SCORED, ended_at=None)
    return Trial(
        number=trial.number,
        state=State.RUNNING,
        strategy=trial.strategy,
        kind=trial.kind,
        name=trial.name,
        key=trial.key,
        worker=trial.worker,
        taken=trial.taken,
        earlier=tuple(span for span in trial.earlier if span[1] <= moment),
        begun_at=trial.begun_at,
    )


def spans(trial: Trial) -> list[tuple[datetime, datetime]]:
    """From when to when workers were at a trial, local time; those first that had left it.

    The last one of a trial that is not settled counts for as long as it has learned: it may have been killed since.
    """
    start, end = trial.taken or trial.begun_at, settled_at(trial)
    if start is None:
        return []
    if end is None:
        learned = timedelta(seconds=trial.learning_seconds or 0.0)
        end = start + learned - sum((stop - begun for begun, stop in trial.earlier), timedelta())
    last = [(start, end)] if end > start else []
    # whoever took it up may have been killed before it noted that it did
    return list(dict.fromkeys([*trial.earlier, *last]))


def worked_hours(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """Hours in which there was work, by when each piece of it began and ended: those that overlap count once."""
    seconds, end = 0.0, datetime.min
    for start, stop in sorted(spans):
        seconds += max(0.0, (stop - max(start, end)).total_seconds())
        end = max(end, stop)
    return seconds / 3600
