"""`search.patience`: whether a strategy still finds what is better beyond noise, and what going on may bring.

Looked at are a strategy's latest candidates, as many as `patience` says. What they brought is the difference between
the best of them and the best before them, of what both are expected to score on documents that no search saw
(`evaluate.expected`): the highest of many scores is too high, and a search that only gets luckier does not improve. The
noise is the standard error of that difference, document by document.

What as many more will bring is the mean of the highest of so many draws from a normal distribution beyond what is best:
the one of the better half of the latest candidates. A search that goes on as it does draws from no better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from mergesearch.config.search import PatienceConfig
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.paying import Documents, ahead_of
from mergesearch.search.trials import State, Trial

# of fewer candidates nobody can tell by how much they vary
FEWEST = 2
_KEY = "standstill:"
_STEPS, _REACH = 2000, 8.0  # of the integral, in standard deviations


@dataclass(frozen=True)
class Standstill:
    """What a strategy's latest candidates brought.

    Attributes:
        label: the strategy, and its stage where it has several: `study`, `study/refine`.
        candidates: how many these are.
        documents: what they cost, in document evaluations.
        before, best: the best expected objective before them, and with them.
        noise: the standard error of the difference between the best of them and the best before.
        ahead: by how much as many more are expected to raise it.
        settings: `search.patience` when that was found, plain data.
    """

    label: str
    candidates: int
    documents: int
    before: float
    best: float
    noise: float
    ahead: float
    settings: Mapping[str, Any]

    @property
    def improves(self) -> bool:
        """Whether they brought more than noise."""
        return self.best - self.before > self.noise

    def words(self) -> str:
        """What there is to say of a strategy that was ended."""
        gain = self.best - self.before
        name = "/".join(dict.fromkeys(self.label.replace("_", " ").split("/")))
        raised = f"raised the best expected objective by {gain:.4f}" if gain > 0 else "found nothing better"
        return (
            f"{name}: ended by search.patience: its last {self.candidates} candidates "
            f"({self.documents:,} document evaluations) {raised}, where the noise is {self.noise:.4f}; as many more "
            f"are expected to bring {self.ahead:.4f}"
        )


def label_of(strategy: str, stage: str | None) -> str:
    """Under which name a strategy's stage is looked at."""
    return strategy if stage is None else f"{strategy}/{stage}"


def ended(history: History, strategy: str, stage: str | None = None) -> Standstill | None:
    """Why a strategy's stage was ended by `search.patience`, as any worker found; None where it goes on, also where it
    was ended by a patience that is no longer the run's."""
    patience = history.config.search.patience
    if patience is None:
        return None
    data = history.notes.get(_KEY + label_of(strategy, stage))
    return Standstill(**data) if data and data["settings"] == patience.model_dump() else None


def is_known(history: History, found: Standstill) -> bool:
    """Whether a worker has noted already that a stage has ended."""
    data = history.notes.get(_KEY + found.label)
    return data is not None and data["settings"] == found.settings


def words(history: History) -> list[str]:
    """What there is to say of every strategy that was ended so."""
    patience = history.config.search.patience
    if patience is None:
        return []
    known = [Standstill(**data) for key, data in history.notes.items() if key.startswith(_KEY)]
    return [found.words() for found in known if found.settings == patience.model_dump()]


def note(history: History, found: Standstill) -> None:
    """Tells every worker that a strategy's stage has ended."""
    store.note(history.study, _KEY + found.label, asdict(found))


def look(
    history: History,
    strategy: str,
    worth: Callable[[], Mapping[int, float]],
    documents: Callable[[int], Documents | None],
) -> Standstill | None:
    """What the latest candidates of a strategy's latest stage brought; None while there are fewer than patience asks
    for, or none that they could be compared with.

    Args:
        history: the run, with a patience.
        worth: gives what complete trials are expected to score elsewhere, by number; asked only where it is needed. A
            trial that it lacks counts as it was scored.
        documents: what the trial of a number did on each document; None where that is not known.
    """
    patience = history.config.search.patience
    trials = history.of(strategy)
    if patience is None or not trials or history.objective is None:
        return None
    stage = trials[-1].key.get("stage")
    mine = [t for t in trials if t.key.get("stage") == stage and t.state.ended and t.same_as is None]
    late = latest(mine, patience)
    if late is None:
        return None
    complete = [trial for trial in history.trials if trial.state is State.COMPLETE and trial.feasible]
    numbers = {trial.number for trial in late}
    before = [trial for trial in complete if trial.number not in numbers]
    ours = [trial for trial in complete if trial.number in numbers]
    if not before:
        return None
    known = worth()

    def value(trial: Trial) -> float:
        return known.get(trial.number, history.value(trial) or 0.0)

    first = max(before, key=value)
    spent = sum(trial.documents for trial in late)
    highest, noise, ahead = value(first), history.objective.stderr(first.scores) or 0.0, 0.0
    if ours:
        rival = max(ours, key=value)
        noise = ahead_of(rival, first, history, documents)[1]
        highest = max(highest, value(rival))
        ahead = expected_gain([value(trial) for trial in ours], highest, len(late))
    return Standstill(
        label_of(strategy, stage), len(late), spent, value(first), highest, noise, ahead, patience.model_dump()
    )


def latest(trials: Sequence[Trial], patience: PatienceConfig) -> Sequence[Trial] | None:
    """The fewest of the latest trials that use a patience up: so many candidates, or so many document evaluations,
    whichever comes first. None while neither is there.

    Args:
        trials: of one stage, those that have ended, by number.
    """
    spent = 0
    for count, trial in enumerate(reversed(trials), start=1):
        spent += trial.documents
        enough = patience.trials is not None and count >= patience.trials
        if enough or (patience.documents is not None and spent >= patience.documents and count >= FEWEST):
            return trials[-count:]
    return None


def expected_gain(values: Sequence[float], best: float, count: int) -> float:
    """By how much the highest of `count` more draws is expected to exceed what is best: the integral from there of
    1 - F(x)^count, F the normal distribution of the better half of the values.

    Args:
        values: of the latest candidates, at least one.
        best: the highest of all.
    """
    center = median(values)
    above = [value - center for value in values if value > center]
    # the mean of a half normal is its deviation times sqrt(2 / pi)
    spread = fmean(above) * math.sqrt(math.pi / 2) if above else 0.0
    if not spread:
        return 0.0
    from scipy.special import ndtr  # a second of imports, for who has a patience

    points = np.linspace(best, max(best, center) + _REACH * spread, _STEPS)
    return float(np.trapezoid(1 - ndtr((points - center) / spread) ** count, points))


__all__ = ["Standstill", "ended", "expected_gain", "is_known", "label_of", "latest", "look", "note", "words"]
