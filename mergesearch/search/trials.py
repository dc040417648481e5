"""What a trial is. The only module that knows under which keys Optuna's study keeps it.

A trial is proposed by a strategy in one of three ways (`Kind`) and goes through these states:

    WAITING -> RUNNING -> SCORED  -> COMPLETE      all documents; the objective follows once the parents fix its scale
                       -> STOPPED -> PRUNED        a race stopped it
                       -> FAILED                   it could not be built or scored

Between two states a worker may be killed: the next one reads the trial and goes on from where it stood.
"""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import lru_cache
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from mergesearch.evaluate.scores import TaskScore
from mergesearch.recipe import Recipe

# recipes that are held ready at a time; of a long search each takes more than all else of its trial
RECIPES = 512
# letters of a text that other trials may have too
LONGEST_WORD = 100
# in place of a worker's id
HANDED_BACK = ""


class Kind(enum.Enum):
    """How a trial's recipe comes about."""

    STATED = "stated"  # the proposal is a recipe
    SAMPLED = "sampled"  # a sampler chooses it from a space
    LEARNED = "learned"  # it is found on the search documents


class State(enum.Enum):
    """How far a trial is."""

    WAITING = "waiting"  # proposed, and no worker has taken it
    RUNNING = "running"  # a worker is at it, or has left it
    SCORED = "scored"  # on all documents; the study has not been told
    STOPPED = "stopped"  # by a race; the study has not been told
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the study was told, so that nothing of the trial changes any more."""
        return self in (State.COMPLETE, State.PRUNED, State.FAILED)

    @property
    def settled(self) -> bool:
        """Whether it needs no more work: what is left is to tell the study."""
        return self.ended or self in (State.SCORED, State.STOPPED)


_STATES = {
    TrialState.WAITING: State.WAITING,
    TrialState.RUNNING: State.RUNNING,
    TrialState.COMPLETE: State.COMPLETE,
    TrialState.PRUNED: State.PRUNED,
    TrialState.FAIL: State.FAILED,
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of a run.

    Attributes:
        number: in the study, from 0.
        state: how far it is.
        strategy: the name of the strategy that proposed it.
        kind: how its recipe comes about.
        name: of a baseline (`base`, a model's name, `average`); None for every other trial.
        key: what its strategy noted, to make the same proposal again or to know it by; plain data.
        recipe_data: the recipe as plain data; None until it is known.
        recipe_id: the recipe's id.
        identity: equal for recipes that do the same to every tensor.
        same_as: the earlier trial whose scores it has, since it does the same; None for one that was scored itself.
        taken_over: whether its scores are another run's, see `strategies.taken_over`.
        scores: each task's score by label, on all search documents; empty until it is scored.
        partial: the same on the documents so far, for one that a race stopped.
        blocks: how many blocks of documents these were.
        stopped: why a race stopped it, in words.
        error: why it failed, in words.
        merge_seconds, score_seconds: what building and scoring the candidate took.
        learning_documents: document evaluations that went into learning its recipe; a backward pass counts as two more.
        learning_seconds: what that took; None where it was not learned, or by a version that did not note it.
        machine: the device and the versions it was scored with.
        worker: who is at it; `HANDED_BACK` where whoever was at it was interrupted and has said so.
        lost: how often a worker ended without a word while it was at it, since it last got further.
        lost_at: its `learning_documents` at the last of these.
        taken: when that worker took it, local time.
        earlier: from when to when other workers had been at it, which did not settle it, as far as they had noted that.
        settled_at: when it was scored or stopped, local time; the study is told of the parents only once all of them
            are scored. None of one that a version scored that did not note it.
        begun_at, ended_at: when it was proposed and when the study was told, local time.
        params: the parameters that samplers know it by.
        excess: for each guard, by task, how far its scores are beyond the limit, in the metric's unit; 0 or less keeps
            it.
    """

    number: int
    state: State
    strategy: str = ""
    kind: Kind = Kind.STATED
    name: str | None = None
    key: Mapping[str, Any] = field(default_factory=dict)
    recipe_data: Mapping[str, Any] | None = None
    recipe_id: str | None = None
    identity: str | None = None
    same_as: int | None = None
    taken_over: bool = False
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    partial: Mapping[str, TaskScore] = field(default_factory=dict)
    blocks: int | None = None
    stopped: str | None = None
    error: str | None = None
    merge_seconds: float | None = None
    score_seconds: float | None = None
    learning_documents: int = 0
    learning_seconds: float | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    worker: str | None = None
    lost: int = 0
    lost_at: int = 0
    taken: datetime | None = None
    earlier: tuple[tuple[datetime, datetime], ...] = ()
    settled_at: datetime | None = None
    begun_at: datetime | None = None
    ended_at: datetime | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    excess: Mapping[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """Its recipe.

        Raises:
            LookupError: it has none yet.
        """
        if self.recipe_data is None:
            raise LookupError(f"trial {self.number} has no recipe yet")
        return _recipe(_Known(self.recipe_id or str(self.number), self.number, self.recipe_data))

    @property
    def feasible(self) -> bool:
        """Whether it keeps every guard."""
        return all(excess <= 0 for excess in self.excess.values())

    @property
    def documents(self) -> int:
        """The document evaluations that it cost: learning its recipe, and scoring it unless an equal one was scored."""
        scored = {} if self.same_as is not None or self.taken_over else self.scores or self.partial
        return self.learning_documents + sum(score.documents for score in scored.values())

    @property
    def seconds(self) -> float:
        """What building and scoring the candidate took."""
        return (self.merge_seconds or 0.0) + (self.score_seconds or 0.0)


@dataclass(frozen=True, slots=True)
class _Known:
    """A recipe as data, known by its id."""

    recipe_id: str
    number: int = field(compare=False)
    data: Mapping[str, Any] = field(compare=False)


@lru_cache(maxsize=RECIPES)
def _recipe(known: _Known) -> Recipe:
    return Recipe.from_data(dict(known.data), f"trial {known.number}")


@lru_cache(maxsize=64)
def _shared(items: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return dict(items)


def _machine(data: Mapping[str, Any]) -> dict[str, Any]:
    """One for all trials of a worker."""
    try:
        return _shared(tuple(data.items()))
    except TypeError:  # no version of ours wrote it
        return dict(data)


@lru_cache
def _alike(kind: BaseDistribution) -> BaseDistribution:
    """One for all parameters that are drawn alike; a storage gives each trial its own."""
    return kind


def _interned(data: Any) -> Any:
    """Plain data with one object for equal strings: trials say the same words over and over."""
    if isinstance(data, str):
        return sys.intern(data) if len(data) <= LONGEST_WORD else data
    if isinstance(data, dict):
        return {_interned(key): _interned(value) for key, value in data.items()}
    return [_interned(value) for value in data] if isinstance(data, list) else data


def _scores(data: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScore]:
    return {task: TaskScore(**values) for task, values in data.items()}


def _plain_scores(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    return {task: asdict(score) for task, score in scores.items()}


def _plain_time(moment: datetime) -> str:
    """With the offset of this host's clock, since whoever reads it may be elsewhere."""
    return moment.astimezone().isoformat()


def _time(data: str) -> datetime:
    """In local time, as Optuna's own times are; versions that wrote no offset wrote local time."""
    moment = datetime.fromisoformat(data)
    return moment if moment.tzinfo is None else moment.astimezone().replace(tzinfo=None)


def _plain_spans(spans: Iterable[tuple[datetime, datetime]]) -> list[list[str]]:
    return [[_plain_time(moment) for moment in span] for span in spans]


def _spans(data: Iterable[tuple[str, str]]) -> tuple[tuple[datetime, datetime], ...]:
    return tuple((_time(start), _time(end)) for start, end in data)


# How a field is kept where it is no plain data: (to plain data, back).
_FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "kind": (lambda kind: kind.value, Kind),
    "scores": (_plain_scores, _scores),
    "partial": (_plain_scores, _scores),
    "key": (dict, dict),
    "machine": (dict, _machine),
    "taken": (_plain_time, _time),
    "earlier": (_plain_spans, _spans),
    "settled_at": (_plain_time, _time),
}
# what Optuna itself knows of a trial
_OPTUNAS = frozenset({"number", "state", "begun_at", "ended_at", "params", "excess"})
_KEPT = tuple(each.name for each in fields(Trial) if each.name not in _OPTUNAS)


def read(trial: FrozenTrial) -> Trial:
    """A trial of a study as a `Trial`."""
    noted = trial.user_attrs
    if trial.state.is_finished():  # Optuna keeps it from now on, as we do
        noted.update((name, _interned(value)) for name, value in list(noted.items()) if name != "machine")
        if "machine" in noted:
            noted["machine"] = _machine(noted["machine"])
        trial.params = _interned(trial.params)
        trial.distributions = {sys.intern(name): _alike(kind) for name, kind in trial.distributions.items()}
    kept = {name: _FORMS[name][1](noted[name]) if name in _FORMS else noted[name] for name in _KEPT if name in noted}
    state = _STATES[trial.state]
    if state is State.RUNNING and kept.get("scores"):
        state = State.SCORED
    elif state is State.RUNNING and kept.get("stopped") is not None:
        state = State.STOPPED
    return Trial(
        number=trial.number,
        state=state,
        begun_at=trial.datetime_start,
        ended_at=trial.datetime_complete,
        params=trial.params,
        excess=trial.constraints,
        **kept,
    )


def at(study: optuna.Study, number: int) -> Trial:
    """A trial of a study by its number, as it is by now."""
    return read(study.get_trials(deepcopy=False)[number])


def handle(study: optuna.Study, number: int) -> optuna.Trial:
    """Optuna's own object of a running trial, through which it is written to."""
    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def plain(**values: Any) -> dict[str, Any]:
    """Fields of a `Trial` as the study keeps them.

    Raises:
        TypeError: a name that is no field, or one that only Optuna sets.
    """
    for name in values:
        if name not in _KEPT:
            raise TypeError(f"{name!r} is no field of a trial that can be written: {', '.join(_KEPT)}")
    return {name: _FORMS[name][0](value) if name in _FORMS else value for name, value in values.items()}


def write(trial: optuna.Trial, **values: Any) -> None:
    """Writes fields of a `Trial`, one after another in the order given.

    A worker may be killed between two of them: what says that the trial is settled (`scores`, `stopped`) comes last.

    Raises:
        TypeError: a name that is no field, or one that only Optuna sets.
    """
    for name, value in plain(**values).items():
        trial.set_user_attr(name, value)


def without_numbers(error: str | None) -> str:
    """A reason for which trials failed, alike for those that differ in a number alone."""
    return re.sub(r"\d+", "N", error or "")


def hand_back(storage: optuna.storages.BaseStorage, trial: optuna.Trial) -> None:
    """Says that nobody is at a trial any more."""
    storage.set_trial_user_attr(trial._trial_id, "worker", HANDED_BACK)


def assign(study: optuna.Study, waiting: FrozenTrial, worker: str) -> None:
    """Says who is about to take a trial that waits, so that it is never at work without a name.

    Raises:
        UpdateFinishedTrialError: it has been taken, and has ended.
    """
    study._storage.set_trial_user_attr(waiting._trial_id, "worker", worker)


def enqueue(study: optuna.Study, **values: Any) -> None:
    """Adds a trial to a study that nobody has taken yet, with fields of a `Trial`.

    Raises:
        TypeError: a name that is no field, or one that only Optuna sets.
    """
    study.enqueue_trial({}, user_attrs=plain(**values))


# --- the copies that the study of a stage holds ----------------------------------------------------------------------

# in such a study: the number of the run's trial that a trial stands for
_STANDS_FOR = "stands_for"


def begin_copy(number: int) -> FrozenTrial:
    """The trial of a stage's own study that is to propose the parameters of a trial of the run."""
    return optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={_STANDS_FOR: number})


def copies(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The trials of a stage's own study, by the number of the run's trial that each stands for."""
    there = study.get_trials(deepcopy=False)
    return {copy.user_attrs[_STANDS_FOR]: copy for copy in there if _STANDS_FOR in copy.user_attrs}


def copy_of(trial: FrozenTrial, names: Iterable[str]) -> FrozenTrial:
    """A trial of the run that has ended, with some of its parameters, for a stage's own study."""
    names = list(names)
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        params={name: trial.params[name] for name in names},
        distributions={name: trial.distributions[name] for name in names},
        user_attrs={_STANDS_FOR: trial.number},
        intermediate_values=trial.intermediate_values,
        constraints=dict(trial.constraints) or None,
    )
