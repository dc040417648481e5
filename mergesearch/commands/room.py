"""What `search.hours` keeps back for the report that a run ends with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from mergesearch.commands.holdout import cost
from mergesearch.config import Config
from mergesearch.results.loading import Run
from mergesearch.search.costs import duration
from mergesearch.search.history import ROOM
from mergesearch.search.speed import Probe
from mergesearch.search.strategies.baselines import baselines

# finding out takes one part of the time in so many
SHARE = 200
# by what part it has to change before workers are told anew
CHANGED = 0.1


class ReportRoom:
    """Reckons again and again what a run's end will take, as long as its search goes on.

    Args:
        config: the run's configuration.
        probe: what was measured before the first trial.
        read: gives the run as it is by now.
        note: tells all workers something of the whole run, by key.
        say: told what is kept back, once it is known.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        config: Config,
        probe: Probe,
        read: Callable[[], Run],
        note: Callable[[str, dict[str, object]], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._probe, self._read, self._note, self._say = config, probe, read, note, say
        self._clock, self._next = clock, clock()
        self._known: float | None = None

    def look(self) -> None:
        """A trial has ended."""
        config, begun = self._config, self._clock()
        if config.search.hours is None or not config.report.at_end or begun < self._next:
            return
        report = cost(self._read(), probe=self._probe)
        now = self._clock()
        self._next = now + SHARE * (now - begun)
        if report is None:
            return
        # there will be more of them by the end than there are by now
        count = max(report.candidates, len(baselines(config)) + config.report.finalists)
        longer = (count + 1) / max(1, report.candidates + report.again)
        report = replace(report, candidates=count, seconds=report.seconds * max(1.0, longer))
        before = self._probe.again + self._probe.export
        seconds = report.seconds + before
        if self._known is not None and abs(seconds - self._known) <= CHANGED * self._known:
            return
        words = f"for the report, {report}"
        words += f"; before it {duration(before)} to score once more by lm-eval and to write the winner" * (before >= 1)
        self._note(ROOM, {"seconds": seconds, "words": words})
        if self._known is None:
            kept = min(seconds, 1800 * config.search.hours)
            self._say(f"note: of {config.search.hours:g} h {duration(kept)} are kept back {words}")
        self._known = seconds
