"""How long a run will still take: the one estimate that `check`, the live view, the table and the benchmark use.

It is a pure function of the configuration and the trials so far. What is to come is walked through strategy by strategy
as the worker does it, within the same budgets, in trials, document evaluations and seconds; how long each of them takes
is measured on the trials so far (`speed_of`), and on a probe before there are any. Nothing here is random or asks the
clock: the same history gives the same estimate, so that finished runs can be replayed (`scripts/bench/estimate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from mergesearch.config import Config
from mergesearch.search import standstill
from mergesearch.search.history import History
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.speed import Probe, Speed, probe_of, speed_of
from mergesearch.search.strategies import of_trial, registered
from mergesearch.search.strategies.base import Strategy


@dataclass(frozen=True)
class Part:
    """What one strategy will still take.

    Attributes:
        strategy: its name.
        trials: that it will still begin.
        documents: document evaluations, those of learning included.
        learning: those of learning alone.
        seconds: of work, over all workers; None where nothing was measured.
        unless: what would make this needless, in words; empty where nothing is likely to.
    """

    strategy: str
    trials: int = 0
    documents: int = 0
    learning: int = 0
    seconds: float | None = 0.0
    unless: str = ""


@dataclass(frozen=True)
class Estimate:
    """What a run will still take.

    Attributes:
        parts: strategy by strategy; those that take nothing more are left out.
        searching: wall-clock seconds until the last trial has ended; None where nothing was measured.
        exporting: seconds to write the winner.
        loading: seconds until the first trial begins, of a run that has not begun.
        again: seconds to score parents, average and winner once more by lm-eval's own model.
    """

    parts: tuple[Part, ...]
    searching: float | None
    exporting: float = 0.0
    loading: float = 0.0
    again: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Wall-clock seconds until the run has ended; None where nothing was measured."""
        return None if self.searching is None else self.loading + self.searching + self.again + self.exporting

    @property
    def trials(self) -> int:
        """How many trials will still begin."""
        return sum(part.trials for part in self.parts)

    @property
    def documents(self) -> int:
        """How many document evaluations are to come."""
        return sum(part.documents for part in self.parts)


def estimate(
    config: Config, history: History | None = None, probe: Probe | None = None, now: datetime | None = None
) -> Estimate | None:
    """What a run will still take; None where not even the number of documents is known.

    Args:
        config: the run's configuration.
        history: the run so far; None before it has begun.
        probe: what was measured before the first trial; None: what the history has noted.
        now: local time, from which the age of trials under way is counted; None takes them as just begun.
    """
    probe = probe or (probe_of(history) if history else None)
    documents = dict(history.documents_of_tasks) if history else {}
    documents = documents or dict(probe.documents if probe else {})
    if not documents:
        return None
    speed = speed_of(config, history, documents, probe)
    walk = _Forecast(config, history, documents, speed)
    walk.finish_begun(now)
    walk.begin_more()
    seconds = max(walk.wall, walk.longest) if speed else None
    ending = probe if walk.parts or _is_running(history) else None
    export, again = (ending.export, ending.again) if ending else (0.0, 0.0)
    parts = tuple(part for part in walk.parts.values() if part.trials or part.documents)
    return Estimate(parts, seconds, export, probe.loading if probe and history is None else 0.0, again)


def _is_running(history: History | None) -> bool:
    return history is None or any(not trial.state.ended for trial in history.trials)


class _Kept(NamedTuple):
    """What is left to strategies that come later."""

    trials: int = 0
    documents: int = 0
    seconds: float = 0.0


class _Forecast:
    """Goes through what is to come, as a worker would, and adds up what it takes."""

    def __init__(self, config: Config, history: History | None, documents: Mapping[str, int], speed: Speed | None):
        self.config, self.history, self.speed = config, history, speed
        self.each = sum(documents.values())
        self.counts = [documents.get(task.task, 0) for task in config.tasks]
        self.parts: dict[str, Part] = {}
        self.longest = 0.0
        self.wall = 0.0
        self._proposals = history.proposals if history else 0
        self._documents = history.documents if history else 0
        self._worked = 3600 * history.hours if history else 0.0
        self._hours = history.hours_to_search if history else config.search.hours
        self._workers = workers_of(history)

    # --- trials under way ---

    def finish_begun(self, now: datetime | None) -> None:
        """What the trials that have begun still take."""
        for trial in self.history.trials if self.history else ():
            if trial.state.settled:
                continue
            kind = of_trial(trial)
            usual = kind.learning(self.config, self.counts, trial.key) if trial.recipe_data is None else 0
            share = self.speed.learned if self.speed else 1.0
            learning = max(0, round(usual * share) - trial.learning_documents)
            scored, seconds = self._candidate(kind.may_race(trial))
            if trial.learning_documents and trial.recipe_data is None:
                age = 0.0  # how far it is stands in its documents
            else:
                age = max(0.0, (now - trial.taken).total_seconds()) if now and trial.taken else 0.0
            self._worked += age / self._workers
            rest = max(0.0, seconds + self._learning(learning) - age)
            self._add(trial.strategy, 0, scored, learning, rest)

    # --- trials to come ---

    def begin_more(self) -> None:
        """What the strategies still begin, in their order."""
        known = registered()
        kinds = [known[name] for name in self.config.search.strategies]
        for position, kind in enumerate(kinds):
            if self.history is not None and (
                self.history.is_exhausted(kind.name) or standstill.ended(self.history, kind.name)
            ):
                continue
            later = self._later(kinds[position + 1 :]) if kind.open_ended else _Kept()
            outlook = self._outlook()
            for ahead in kind.expects(outlook):
                self._begin(kind, ahead, later)

    def _outlook(self) -> Outlook:
        return Outlook(self.config, self.counts, self.history, self._proposals)

    def _later(self, kinds: Sequence[type[Strategy]]) -> _Kept:
        """What they want, and no more than half of a budget: see `Budget.kept`."""
        trials, documents, seconds = 0, 0, 0.0
        for kind in kinds:
            for ahead in kind.expects(self._outlook()) if kind.counts and kind.budgeted else ():
                count = ahead.trials or 0
                trials += count
                documents += count * (ahead.learning + self.each)
                seconds += count * self._trial(ahead)[1]
        search = self.config.search
        if search.documents is not None:
            documents = min(documents, search.documents // 2)
        return _Kept(trials, documents, min(seconds, (self._hours or 0.0) * 3600 / 2))

    def _begin(self, kind: type[Strategy], ahead: Ahead, later: _Kept) -> None:
        scored, seconds = self._trial(ahead)
        share = self.speed.learned if self.speed else 1.0
        learning = round(ahead.learning * share)
        count = self._affordable(ahead.trials, kind, later, scored + learning, seconds)
        if not count:
            return
        left = self._documents_left(later)
        if kind.budgeted and left is not None:  # learning ends with the budget
            spare = max(0.0, left - (count - 1) * (scored + learning))
            cut = max(0, math.ceil(learning - spare))
        else:
            cut = 0
        self._add(
            kind.name,
            count,
            count * scored,
            count * learning - cut,
            count * seconds - self._learning(cut),
            seconds,
            ahead.unless,
        )
        self._proposals += count if kind.counts and not ahead.copies else 0

    def _affordable(
        self, wanted: int | None, kind: type[Strategy], later: _Kept, documents: float, seconds: float
    ) -> int:
        """How many trials begin before a budget is used up; the last one may go beyond it."""
        if not kind.budgeted:
            return wanted or 0
        trials = max(0, self.config.search.trials - later.trials - self._proposals)
        counts = [trials if wanted is None else min(wanted, trials)]
        left = self._documents_left(later)
        if left is not None:
            counts.append(math.ceil(max(0.0, left) / max(documents, 1e-9)))
        if self._hours is not None:
            rest = 3600 * self._hours - later.seconds - self._worked - self.wall
            if rest <= 0:
                counts.append(0)
            elif seconds > 0:
                counts.append(math.ceil(rest * self._workers / seconds))
        return min(counts)

    def _documents_left(self, later: _Kept) -> float | None:
        budget = self.config.search.documents
        return None if budget is None else budget - later.documents - self._documents

    # --- what a trial takes ---

    def _candidate(self, races: bool) -> tuple[float, float]:
        """(document evaluations, seconds) of building and scoring one candidate."""
        if self.speed is None:
            return self.each, 0.0
        documents, seconds = self.speed.raced if races and self.config.racing else (1.0, 1.0)
        return self.each * documents, self.speed.merge + seconds * self.speed.score + self.speed.beside

    def _learning(self, documents: float) -> float:
        return self.speed.learning * documents if self.speed else 0.0

    def _trial(self, ahead: Ahead) -> tuple[float, float]:
        """(document evaluations of scoring, seconds) of a trial to come."""
        if ahead.copies:
            return 0.0, self.speed.beside if self.speed else 0.0
        share = self.speed.learned if self.speed else 1.0
        scored, seconds = self._candidate(ahead.races)
        return scored, seconds + self._learning(ahead.learning * share)

    def _add(
        self,
        strategy: str,
        trials: int,
        scored: float,
        learning: int,
        seconds: float,
        longest: float = 0.0,
        unless: str = "",
    ) -> None:
        part = self.parts.get(strategy, Part(strategy))
        documents = round(scored) + learning
        self.parts[strategy] = Part(
            strategy,
            part.trials + trials,
            part.documents + documents,
            part.learning + learning,
            None if self.speed is None else (part.seconds or 0.0) + seconds,
            unless or part.unless,
        )
        self._documents += documents
        self.wall += seconds / self._workers
        self.longest = max(self.longest, longest or seconds)


def workers_of(history: History | None) -> int:
    """How many workers are at work: those that have a trial under way, and one at least."""
    return max(1, len({t.worker for t in history.trials if not t.state.settled and t.worker})) if history else 1


__all__ = ["Estimate", "Part", "estimate"]
