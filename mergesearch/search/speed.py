"""How fast a run is, measured on its trials: what the estimate of the time left multiplies with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from mergesearch.config import Config
from mergesearch.search import store
from mergesearch.search.history import History
from mergesearch.search.strategies import of_trial
from mergesearch.search.trials import State, Trial

# a document evaluation of learning, in seconds of one of scoring, where neither was measured: 0.7 to 1.4 on the zoo
LEARNING = 1.0
# what counts of a trial, for each trial that came after it: other work on the machine comes and goes
FADING = 0.85
# the shares of its documents and of its time that a raced trial takes (small blocks fill no batch: on the zoo 0.5 and
# 0.75), and how many trials that guess counts as
RACED, GUESSED = (0.5, 0.75), 2


# where the study notes what the last start measured before its first trial
PROBE = "probe"


@dataclass(frozen=True)
class Probe:
    """What was measured before the first trial.

    Attributes:
        documents: the search documents of each task that is scored, by label.
        scoring: seconds a document of each task; those that were tried.
        merge: seconds a merge.
        learning: seconds a document evaluation of learning; None where nothing is learned by gradients.
        loading: seconds from the start of the command to the first trial.
        export: seconds to write the winner.
        again: seconds to score parents, average and winner once more by lm-eval's own model.
    """

    documents: Mapping[str, int]
    scoring: Mapping[str, float] = field(default_factory=dict)
    merge: float = 0.0
    learning: float | None = None
    loading: float = 0.0
    export: float = 0.0
    again: float = 0.0

    @property
    def score(self) -> float | None:
        """Seconds to score a candidate on all documents; None where a task was not tried."""
        if not self.scoring or not self.documents.keys() <= self.scoring.keys():
            return None
        return sum(self.scoring[task] * count for task, count in self.documents.items())

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def probe_of(history: History) -> Probe | None:
    """What the last start noted; None of a run that a version without probes began."""
    noted = store.noted(history.study, PROBE)
    return Probe(**noted) if noted else None


@dataclass(frozen=True)
class Speed:
    """What things take, in seconds of one worker.

    Attributes:
        merge, score: of one candidate, on all documents.
        learning: of one document evaluation in learning a recipe.
        beside: what a trial takes beside merging, scoring and learning: the study, its sampler, files.
        raced: (share of the documents, share of the time) that a trial takes which a race may stop.
        learned: document evaluations of learning, as a share of what is usual.
    """

    merge: float
    score: float
    learning: float
    beside: float = 0.0
    raced: tuple[float, float] = (1.0, 1.0)
    learned: float = 1.0


def speed_of(
    config: Config, history: History | None, documents: Mapping[str, int], probe: Probe | None
) -> Speed | None:
    """What the trials so far say; the probe where they say nothing; None where neither does.

    Args:
        documents: the search documents of each task that is scored.
    """
    trials = history.trials if history else []
    whole = [trial for trial in trials if trial.scores and trial.same_as is None and trial.score_seconds is not None]
    # answers that an earlier start kept are not asked for again: such a trial says nothing about scoring
    whole = [trial for trial in whole if trial.score_seconds]
    each = sum(documents.values())
    if whole:
        score = _mean(trial.score_seconds or 0.0 for trial in whole)
        merge = _mean(trial.merge_seconds or 0.0 for trial in whole)
    elif probe is not None and probe.score is not None:
        score, merge = probe.score, probe.merge
    else:
        return None
    counts = [documents.get(task.task, 0) for task in config.tasks]
    return Speed(
        merge=merge,
        score=score,
        learning=_learning(trials, score / max(1, each), probe),
        beside=_beside(trials),
        raced=_raced(trials, each, score),
        learned=_learned(config, trials, counts),
    )


def _mean(values: Iterable[float]) -> float:
    """The mean, the latest counting most; 0 of none."""
    total = weight = 0.0
    for value in values:
        total, weight = FADING * total + value, FADING * weight + 1
    return total / weight if weight else 0.0


def _learning(trials: Sequence[Trial], scoring: float, probe: Probe | None) -> float:
    """Seconds of a document evaluation in learning.

    Args:
        scoring: of one in scoring.
    """
    rates = []
    for trial in trials:
        seconds = learning_seconds(trial)
        if seconds and trial.learning_documents:
            rates.append(seconds / trial.learning_documents)
    if rates:
        return _mean(rates)
    return probe.learning if probe is not None and probe.learning is not None else LEARNING * scoring


def learning_seconds(trial: Trial) -> float | None:
    """What learning its recipe took; None where nothing was learned, or where it is not known."""
    if trial.learning_seconds is not None or not trial.learning_documents:
        return trial.learning_seconds
    # of a version that did not note it
    start, end = trial.taken or trial.begun_at, trial.ended_at
    return None if start is None or end is None else max(0.0, (end - start).total_seconds() - trial.seconds)


def _beside(trials: Sequence[Trial]) -> float:
    """From taking one trial to taking the next, a worker does what the trial's own times do not say."""
    by_worker: dict[str | None, list[Trial]] = {}
    for trial in trials:
        if trial.taken is not None:
            by_worker.setdefault(trial.worker, []).append(trial)
    gaps = []
    for mine in by_worker.values():
        ordered = sorted(mine, key=lambda trial: (trial.taken, trial.number))
        for one, following in pairwise(ordered):
            if one.taken is None or following.taken is None or not one.state.settled:
                continue
            wall = (following.taken - one.taken).total_seconds()
            gaps.append((one.number, max(0.0, wall - one.seconds - (learning_seconds(one) or 0.0))))
    return _mean(gap for _, gap in sorted(gaps))


def _raced(trials: Sequence[Trial], each: int, score: float) -> tuple[float, float]:
    documents, seconds = (GUESSED * share for share in RACED)
    count = GUESSED
    for trial in trials:
        done = trial.state.settled and trial.state is not State.FAILED and trial.same_as is None
        if not done or not of_trial(trial).may_race(trial) or not (trial.scores or trial.partial):
            continue
        scored = trial.documents - trial.learning_documents
        documents += scored / max(1, each)
        seconds += min(1.0, (trial.score_seconds or 0.0) / score) if trial.partial else 1.0
        count += 1
    return documents / count, seconds / count


def _learned(config: Config, trials: Sequence[Trial], counts: Sequence[int]) -> float:
    done = [trial for trial in trials if trial.learning_documents and trial.recipe_data is not None]
    usual = sum(of_trial(trial).learning(config, counts, trial.key) for trial in done)
    return sum(trial.learning_documents for trial in done) / usual if usual else 1.0
