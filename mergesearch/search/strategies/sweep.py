"""The sweep: one number of each method over its whole range, raced on few documents, before anything finer begins.

A soup and a study start from the best that is there, and what is there before is a handful of published defaults. On a
pool of four siblings of a small language model these had 0.39 to 0.44 where the same method with another number had
0.69. So the first thing to look for is that number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mergesearch.config import Config
from mergesearch.errors import CandidateError
from mergesearch.recipe import Recipe, Rule
from mergesearch.registry import register
from mergesearch.search.budget import Budget, Wanted, still_wanted
from mergesearch.search.history import History
from mergesearch.search.lines import Documents, Line, Point, lines_of
from mergesearch.search.outlook import Ahead, Outlook
from mergesearch.search.strategies.base import WAIT, Cost, Learned, Proposal, Stated, Strategy, Wait
from mergesearch.search.strategies.baselines import baselines
from mergesearch.search.trials import State, Trial
from mergesearch.search.work import Work
from mergesearch.space import frozen_rules

# of the run's document evaluations, the share that it may take
SHARE = 1 / 20
# the fewest and the most candidates that it scores on all documents
FEWEST, MOST = 1, 3


@register
class Sweep(Strategy):
    """Each method's one number over its whole range, raced on few documents; the best points are scored on all.

    Of `space.methods` it takes task_arithmetic (and linear: the way from the base through the average and beyond, with
    weights that are the same in all layers or grow with depth), ties at two densities, DARE, DELLA and breadcrumbs. It
    takes a twentieth of the run's document evaluations, or those of two candidates where that is more. Its trials do
    not count against `search.trials`.
    """

    name = "sweep"
    auto: ClassVar[int | None] = 1
    counts = False

    # --- before a run ---

    @classmethod
    def cost(cls, config: Config, documents: Sequence[int]) -> Cost:
        if not lines_of(config.space.methods, len(config.models)):
            return Cost()
        race, trials = _shares(_least_whole(config, sum(documents)), sum(documents))
        return Cost(trials, race, f"about {race:,} to sweep each method's one number")

    @classmethod
    def expects(cls, outlook: Outlook) -> Sequence[Ahead]:
        there, cost = outlook.of(cls.name), cls.cost(outlook.config, outlook.documents)
        if there:
            others = there[0].key.get("others", ())[: there[0].key["trials"] - 1]
            left = len(others) + 1 - len(there)
            return [Ahead(left, races=False)] if left > 0 else []
        return [Ahead(1, cost.documents, races=False)] if cost.trials else []

    @classmethod
    def learning(cls, config: Config, documents: Sequence[int], key: Mapping[str, Any]) -> int:
        return key.get("budget", 0)

    # --- during a run ---

    def next(self, history: History, budget: Budget) -> Proposal | Wait | None:
        if self.run.learner is None or not self._lines:
            return None
        mine = history.of(self.name)
        if not mine:
            if history.objective is None:
                return WAIT
            race, trials = _shares(budget.whole, history.documents_each)
            return self._learned({"budget": race, "trials": trials})
        first = mine[0]
        if not first.state.ended:
            return WAIT
        proposed = {(trial.key["line"], trial.key["at"]) for trial in mine if "line" in trial.key}
        for name, at in first.key.get("others", ())[: first.key["trials"] - 1]:
            if (name, at) not in proposed:
                return Stated(self._recipe(self._line(name).rules(at)), key={"line": name, "at": at})
        return None

    def wants(self, history: History) -> Wanted:
        mine = history.of(self.name)
        learning = sum(still_wanted(trial, trial.key.get("budget", 0), history) for trial in mine)
        others = mine[0].key["trials"] - len(mine) if mine and not mine[0].state.ended else 0
        return Wanted(0, learning + others * history.documents_each)

    def again(self, trial: Trial, history: History) -> Learned:
        return self._learned(trial.key)

    def _learned(self, key: Mapping[str, Any]) -> Learned:
        def find(work: Work) -> Recipe:
            if self.run.learner is None:
                raise CandidateError("nothing can be swept here")
            found = self.run.learner.sweep(self._lines, key["budget"], self._known(work.history), work)
            best, *others = found.points
            told = [(point.line.name, point.value) for point in others]
            work.note({"line": best.line.name, "at": best.value, "others": told})
            return self._baseline(best) or self._recipe(best.line.rules(best.value))

        return Learned(find, key)

    def _known(self, history: History) -> dict[str, Documents]:
        """What the baselines that lie on the lines did on all documents; where tensors are frozen none of them does."""
        if self.config.space.freeze:
            return {}
        found: dict[str, Documents] = {}
        for name in {name for line in self._lines for name in line.known}:
            trial = history.named(name)
            there = self.run.documents(trial.number) if trial is not None and trial.state is State.COMPLETE else None
            if there is not None:
                found[name] = there
        return found

    def _baseline(self, point: Point) -> Recipe | None:
        """The recipe of the baseline that a point is, which is scored already; None where it is none."""
        at = {value: name for name, value in point.line.known.items()}
        return baselines(self.config).get(at.get(point.value, "")) if point.free else None

    @property
    def _lines(self) -> list[Line]:
        return lines_of(self.config.space.methods, len(self.config.models), self.run.layers)

    def _line(self, name: str) -> Line:
        return next(line for line in self._lines if line.name == name)

    def _recipe(self, rules: tuple[Rule, ...]) -> Recipe:
        return self.config.recipe((*frozen_rules(self.config.space, tuple(self.config.models)), *rules))

    # --- its trials, in tables ---

    @classmethod
    def may_race(cls, trial: Trial) -> bool:
        return False  # a race is against the best of all, a single model too; this is the best mix to start from

    @classmethod
    def trials_in_words(cls, count: int) -> str:
        return f"{count} of the sweep" if count > 1 else "the sweep"

    @classmethod
    def words(cls, history: History) -> list[str]:
        first = next(iter(history.of(cls.name)), None)
        if first is None or "at" not in first.key:
            return []
        return [f"sweep: best of all that was tried on few documents: {first.key['line']} at {first.key['at']:g}"]


def _least_whole(config: Config, each: int) -> int:
    """The document evaluations of a run that has not begun, without its baselines and the learning of soups."""
    whole = config.search.trials * each
    return whole if config.search.documents is None else min(whole, config.search.documents)


def _shares(whole: int, each: int) -> tuple[int, int]:
    """(document evaluations of the race, candidates that are scored on all documents)."""
    mine = max(round(whole * SHARE), (FEWEST + 1) * each)
    trials = max(FEWEST, min(MOST, mine // 2 // max(1, each)))
    return mine - trials * each, trials
