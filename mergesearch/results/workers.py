"""Who is at work on a run and how far that gets, as any host reads it in the storage while it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from mergesearch.results.record import Record
from mergesearch.results.states import FAILED
from mergesearch.search.costs import duration
from mergesearch.search.history import History, settled_at
from mergesearch.search.presence import SILENT, Sign
from mergesearch.search.strategies import of_trial
from mergesearch.search.trials import Trial, without_numbers

# trials an hour are those of the last hour, or since the first where that is less
PACE = 3600.0
# more reasons for which trials failed are for the page
REASONS = 5
_NAMED = 6


@dataclass(frozen=True)
class Worker:
    """One worker at a moment.

    Attributes:
        host, pid, device: where it is at work.
        doing: what it does now, in words.
        trials: how many it has settled.
        silent: seconds since its last sign of life, by the clocks of both hosts.
        memory: bytes in use on its device and all that it has; None where it has none of its own.
    """

    host: str
    pid: int
    device: str
    doing: str
    trials: int
    silent: float = 0.0
    memory: tuple[int, int] | None = None

    def words(self) -> str:
        """`node3, process 71, cuda:0 (31 of 80 GiB): trial 17 study ties for 40 s, 120 of 400 documents; 12 trials`."""
        used = f" ({_gib(self.memory[0])} of {_gib(self.memory[1])} GiB)" if self.memory else ""
        late = f"; no sign for {duration(self.silent)}" if self.silent > SILENT else ""
        done = f"{self.trials} trial{'s' * (self.trials != 1)}"
        return f"{self.host}, process {self.pid}, {self.device}{used}: {self.doing}; {done}{late}"


@dataclass(frozen=True)
class AtWork:
    """All workers of a run at a moment.

    Attributes:
        workers: those that have not said that they end, by host.
        pace: trials an hour of all of them together; None before two are settled.
    """

    workers: tuple[Worker, ...] = ()
    pace: float | None = None

    @property
    def living(self) -> bool:
        """Whether one of them gave a sign of life not long ago."""
        return any(worker.silent <= SILENT for worker in self.workers)

    def words(self) -> list[str]:
        """A line for all of them, and one for each; empty where nobody is at work."""
        if not self.workers:
            return []
        pace = "" if self.pace is None else f", {self.pace:.0f} trials an hour together"
        return [f"workers: {len(self.workers)}{pace}", *(f"worker: {worker.words()}" for worker in self.workers)]


def crew_of(history: History, signs: Mapping[str, Sign], now: datetime | None = None) -> AtWork:
    """Who is at work on a run, by the signs that its workers leave.

    Args:
        history: the run so far.
        signs: of every worker that it has had.
        now: the time; by default that of this host's clock.
    """
    now = now or datetime.now(timezone.utc)
    at_work = {trial.worker: trial for trial in history.trials if trial.worker and not trial.state.settled}
    settled: dict[str | None, int] = {}
    for trial in history.trials:
        if trial.state.settled:
            settled[trial.worker] = settled.get(trial.worker, 0) + 1
    here = []
    for sign in sorted(signs.values(), key=lambda sign: (sign.host, sign.device, sign.pid)):
        silent, trial = max(0.0, (now - sign.at).total_seconds()), at_work.get(sign.worker)
        # one that was silent for so long and left no trial has long been given up
        if sign.ended or (silent > SILENT and trial is None):
            continue
        memory = None if sign.used is None or sign.memory is None else (sign.used, sign.memory)
        doing = _doing(trial, sign, now)
        here.append(Worker(sign.host, sign.pid, sign.device, doing, settled.get(sign.worker, 0), silent, memory))
    return AtWork(tuple(here), pace(history.trials, now) if here else None)


def _doing(trial: Trial | None, sign: Sign, now: datetime) -> str:
    if trial is None:
        return "between trials"
    # a trial's times are read back in local time; so is this
    since = "" if trial.taken is None else f" for {duration((_local(now) - trial.taken).total_seconds())}"
    strategy = of_trial(trial)
    what = " ".join(dict.fromkeys(part for part in (strategy.label(trial), strategy.method(trial)) if part))
    learned = f", {trial.learning_documents:,} documents learned from" if trial.learning_documents else ""
    return f"trial {trial.number} {what}{since}{learned}{f', {sign.doing}' if sign.doing else ''}"


def pace(trials: Sequence[Trial], now: datetime) -> float | None:
    """Trials an hour of all workers: those that were settled in the last hour, over the time since the first of them
    began; None before two were."""
    moment = _local(now)
    late = [
        (trial.taken or when, when)
        for trial in trials
        if (when := settled_at(trial)) is not None and 0 <= (moment - when).total_seconds() <= PACE
    ]
    if len(late) < 2:
        return None
    seconds = min(PACE, (moment - min(begun for begun, _ in late)).total_seconds())
    return len(late) * 3600 / max(seconds, 1.0)


def _local(now: datetime) -> datetime:
    return now.astimezone().replace(tzinfo=None)


def _gib(count: int) -> str:
    return f"{count / 2**30:.0f}"


def failures(records: Iterable[Record]) -> list[str]:
    """`failed: 3 trials (4, 9, 12): out of memory`, a line for each reason, numbers in it apart; the most frequent
    first."""
    reasons: dict[str, list[Record]] = {}
    for record in records:
        if record.state == FAILED:
            reasons.setdefault(without_numbers(record.error), []).append(record)
    lines = []
    for mine in sorted(reasons.values(), key=len, reverse=True)[:REASONS]:
        numbers = ", ".join(str(record.number) for record in mine[:_NAMED]) + ", ..." * (len(mine) > _NAMED)
        count = f"{len(mine)} trial{'s' * (len(mine) != 1)}"
        lines.append(f"failed: {count} ({numbers}): {mine[0].error or 'no reason is known'}")
    more = len(reasons) - len(lines)
    return [*lines, *([f"failed: for {more} more reasons"] if more > 0 else [])]


__all__ = ["AtWork", "Worker", "crew_of", "failures", "pace"]
