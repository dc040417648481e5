"""What a page is about: one run as it stands, with the figures that its pictures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mergesearch.evaluate.resampling import Measure, Resampling, Sample
from mergesearch.evaluate.scores import DocumentScores, TaskScore, load_documents
from mergesearch.recipe import AVERAGE, BASE
from mergesearch.results.loading import Run
from mergesearch.results.record import Record, best_single, ranked
from mergesearch.results.report.data import OBJECTIVE, Figure, Report, Section
from mergesearch.results.report.finalists import choose
from mergesearch.results.report.holdout import HoldoutScores
from mergesearch.search.objective import Objective
from mergesearch.search.trials import Trial

# of the intervals that no report has
DRAWS = 2_000
WINNER, SINGLE, PLAIN, DEFAULT = "winner", "best single model", "plain average", "best default"


@dataclass(frozen=True, eq=False)
class Subject:
    """One run for a page.

    Attributes:
        run: as it was read.
        trials: its trials by number, with what a record does not hold: times and costs.
        verdict: what it came to, in one sentence.
        report: on the holdout; None before there is one.
        importances: by method, how much of the objective's variance each parameter accounts for, and over how many
            trials.
        examples: documents on which winner and best single model differ, as the report kept them: `task`, `document`,
            `prompt`, `target`, `against`, and of either side `value` and `answer`.
        anatomy: kinds of tensors with their component and layer, as the run noted them; empty of an older run.
        at_work: whether a worker is at the run.
        over: whether nothing is left to do.
    """

    run: Run
    trials: Sequence[Trial]
    verdict: str
    report: Report | None = None
    importances: Sequence[Mapping[str, Any]] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    anatomy: Mapping[str, Any] = field(default_factory=dict)
    at_work: bool = False
    over: bool = True

    @property
    def name(self) -> str:
        return self.run.config.name

    @property
    def objective(self) -> Objective | None:
        return self.run.objective

    @cached_property
    def ranked(self) -> list[Record]:
        """Every record, the best first."""
        return ranked(self.run.records)

    @cached_property
    def scored(self) -> list[Record]:
        """The complete ones among them."""
        return [record for record in self.ranked if record.objective is not None]

    @cached_property
    def tasks(self) -> dict[str, TaskScore]:
        """The tasks of the objective, each with one score that names its metric."""
        if self.objective is None or not self.scored:
            return {}
        return {task: self.scored[0].scores[task] for task in self.objective.weights}

    @cached_property
    def contenders(self) -> dict[str, Record]:
        """The winner and whom it has to beat; one that is the winner itself, or was not scored, is left out."""
        winner = self.run.best()
        if winner is None:
            return {}
        if self.report is not None and (told := self.record(self.report.winner_trial)) is not None:
            winner = told
        parents = {*self.run.config.parents, AVERAGE}
        named = {record.name: record for record in reversed(self.scored) if record.name}
        defaults = [record for record in self.scored if record.name and record.name not in parents]
        found = {
            WINNER: winner,
            SINGLE: best_single(self.run.records, self.run.config.models),
            PLAIN: named.get(AVERAGE),
            DEFAULT: defaults[0] if defaults else None,
        }
        there = {what: record for what, record in found.items() if record is not None}
        return {what: each for what, each in there.items() if what == WINNER or each.number != winner.number}

    @cached_property
    def finalists(self) -> list[Record]:
        """Who is compared task by task: the report's finalists, or who they would be now, without the defaults."""
        if not self.scored or self.scored[0].infeasible:
            return []
        chosen = choose(self.run.records, self.run.config, self.run.config.report.finalists).records
        kept = {*self.run.config.parents, AVERAGE}
        numbers = {each.number for each in self.contenders.values()}
        shown = [each for each in chosen if not each.name or each.name in kept or each.number in numbers]
        return [*(self.contenders[WINNER],), *(each for each in shown if each.number != self.contenders[WINNER].number)]

    @property
    def benchmarks(self) -> list[Section]:
        """What the report scored on tasks that the search never used."""
        if self.report is None or self.objective is None:
            return []
        searched = {OBJECTIVE, *self.objective.weights, *(guard.name for guard in self.objective.guards)}
        return [section for section in self.report.sections if section.name not in searched]

    @cached_property
    def base(self) -> Record | None:
        return next((record for record in self.scored if record.name == BASE), None)

    def record(self, number: int) -> Record | None:
        """The record of a trial."""
        return next((record for record in self.run.records if record.number == number), None)

    # --- intervals ---

    @cached_property
    def search(self) -> Intervals:
        """Of the search documents."""
        shown = [*self.finalists, *self.contenders.values()]
        documents = {each.number: self._documents(each.number) for each in shown}
        return self._intervals(documents, {each.number: dict(each.scores) for each in shown})

    @cached_property
    def holdout(self) -> Intervals:
        """Of the holdout documents; of nobody before there is a report. What it has is as it has it."""
        kept = HoldoutScores(self.run.folder.holdout)
        documents: dict[int, Mapping[str, DocumentScores]] = {}
        scores: dict[int, Mapping[str, TaskScore]] = {}
        sections = self.report.sections if self.report else ()
        told = {(row.trial, each.name): row.holdout for each in sections for row in each.rows if row.holdout}
        asked = {section.name: section.documents for section in sections}
        for record in self.scored:
            if (record.number, OBJECTIVE) not in told:
                continue
            try:
                found = kept.load(record, "", kept.most(record))
            except (OSError, ValueError):
                continue
            # a report that was cut off may have asked some of them about more
            if found is not None and all(len(of.ids) == asked.get(task) for task, of in found.documents.items()):
                documents[record.number], scores[record.number] = found.documents, found.tasks
        return self._intervals(documents, scores, told)

    def _documents(self, number: int) -> Mapping[str, DocumentScores]:
        trial = next((trial for trial in self.trials if trial.number == number), None)
        places = [number, *([trial.same_as] if trial is not None and trial.same_as is not None else [])]
        for place in places:
            try:
                return load_documents(self.run.folder.documents(place))
            except (OSError, ValueError):
                continue
        return {}

    def _intervals(
        self,
        documents: Mapping[int, Mapping[str, DocumentScores]],
        scores: Mapping[int, Mapping[str, TaskScore]],
        told: Mapping[tuple[int, str], Figure] | None = None,
    ) -> Intervals:
        made = Intervals.of(self.objective, documents, scores, self.run.config.search.seed)
        return replace(made, told=told or {})


@dataclass(frozen=True, eq=False)
class Intervals:
    """Figures of some candidates on the same documents, with 95 % intervals by the paired bootstrap.

    Attributes:
        objective: of the run; None where it is not fixed.
        scores: the tasks' figures of each candidate, by trial.
        places: where a candidate with values for every document stands in `resampling`.
        resampling: of those; None where there are none.
        told: figures that are known already, by trial and measure.
    """

    objective: Objective | None
    scores: Mapping[int, Mapping[str, TaskScore]]
    places: Mapping[int, int] = field(default_factory=dict)
    resampling: Resampling | None = None
    told: Mapping[tuple[int, str], Figure] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        objective: Objective | None,
        documents: Mapping[int, Mapping[str, DocumentScores]],
        scores: Mapping[int, Mapping[str, TaskScore]],
        seed: int,
    ) -> Intervals:
        """Of candidates' documents and scores, by trial."""
        if objective is None:
            return cls(None, scores)
        tasks = list(objective.weights)
        whole = [number for number, of in documents.items() if all(task in of for task in tasks)]
        if not whole:
            return cls(objective, scores)
        samples = {task: Sample.of([documents[number][task] for number in whole]) for task in tasks}
        if any(sample.values.shape[1] < 2 for sample in samples.values()):
            return cls(objective, scores)
        places = {number: place for place, number in enumerate(whole)}
        return cls(objective, scores, places, Resampling(samples, seed, DRAWS))

    def figure(self, number: int, measure: str = OBJECTIVE) -> Figure | None:
        """A candidate's objective, or one task's figure; None of a candidate without scores."""
        if (number, measure) in self.told:
            return self.told[number, measure]
        value = self._value(number, measure)
        if value is None:
            return None
        place, resampling = self.places.get(number), self.resampling
        if place is None or resampling is None:
            return Figure(value)
        return _around(value, resampling.spread(self._measure(number, measure), place))

    def difference(self, ours: int, theirs: int) -> Figure | None:
        """The objective of one minus that of another, paired document by document."""
        values = self._value(ours, OBJECTIVE), self._value(theirs, OBJECTIVE)
        if values[0] is None or values[1] is None:
            return None
        value = values[0] - values[1]
        if self.resampling is None or not {ours, theirs} <= self.places.keys():
            return Figure(value)
        spread = self.resampling.difference_spread(
            self._measure(ours, OBJECTIVE), self.places[ours], self.places[theirs]
        )
        return _around(value, spread)

    def _value(self, number: int, measure: str) -> float | None:
        scores = self.scores.get(number)
        if not scores or self.objective is None or not self.objective.weights.keys() <= scores.keys():
            return None
        return self.objective.value(scores) if measure == OBJECTIVE else scores[measure].value

    def _measure(self, number: int, measure: str) -> Measure:
        assert self.objective is not None
        return self.objective.factors(self.scores[number]) if measure == OBJECTIVE else {measure: 1.0}


def _around(value: float, spread: tuple[float, float] | None) -> Figure:
    return Figure(value, value + spread[0], value + spread[1]) if spread else Figure(value)


def label_of(record: Record) -> str:
    """`order`, `trial 18 ties`: how a page names a candidate."""
    return record.name or f"trial {record.number} {record.method}".rstrip()


def stages(records: Iterable[Record]) -> list[str]:
    """Who proposed trials, in words, in order of appearance."""
    return list(dict.fromkeys(record.strategy or "" for record in records))
