"""From the finalists' scores to the report.

What is asked is fixed before a holdout document is looked at, on the search documents alone: who the winner is, and
which single model is the best (over all tasks, by the objective; a task's own specialist stands in the task's table).
The claim is about the winner's objective against each reference, with Holm's correction over these; every other
comparison that is shown is corrected over all of those together, and no claim is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergesearch.evaluate.resampling import DRAWS, TIE, Measure, Resampling, Sample, holm
from mergesearch.evaluate.scores import Scores
from mergesearch.results.record import Record
from mergesearch.results.report.data import (
    BETTER,
    BROKEN,
    KEPT,
    LEVEL,
    NOISE,
    OBJECTIVE,
    UNSCORED,
    UNTESTED,
    WORSE,
    Comparison,
    Figure,
    GuardOutcome,
    Noise,
    Report,
    Row,
    Section,
)
from mergesearch.results.report.words import sentence


@dataclass(frozen=True, eq=False)
class Entry:
    """One candidate: its row of the table, and its scores on the holdout or why it has none.

    Attributes:
        objective: on the holdout, the scale fixed by the search documents.
        repeated: the scores of the second scoring, for the winner.
    """

    record: Record
    scores: Scores | None
    objective: float | None = None
    error: str | None = None
    repeated: Scores | None = None
    repeated_objective: float | None = None

    @property
    def label(self) -> str:
        return self.record.name or f"trial {self.record.number}"


@dataclass(frozen=True)
class Question:
    """What the report is about, fixed on the search documents.

    Attributes:
        run: the run's name.
        winner: the winner's trial.
        references: `data.SINGLE`, `data.AVERAGE` -> the trial; one that is the winner itself, or failed, is left out.
        factors: of each task in the objective, signed so that more is better.
        seed: of the draws.
        repeat: in words, how the second scoring of the winner differed.
        notes: to be passed on.
        guards: guard task -> (the trial that it is against, max_drop).
    """

    run: str
    winner: int
    references: Mapping[str, int]
    factors: Measure
    seed: int = 0
    repeat: str = ""
    notes: tuple[str, ...] = ()
    guards: Mapping[str, tuple[int, float]] = field(default_factory=dict)


def build(question: Question, entries: Sequence[Entry], draws: int = DRAWS) -> Report:
    """The report.

    Args:
        question: what is asked.
        entries: winner, references and whatever else is to be shown, in the order of the rows.
        draws: of the bootstrap and of the randomisation test.
    """
    return _Builder(question, entries, draws).report()


@dataclass(frozen=True, eq=False)
class _Scored:
    """An entry that has scores."""

    record: Record
    label: str
    scores: Scores
    objective: float

    @classmethod
    def of(cls, entry: Entry, scores: Scores) -> _Scored:
        return cls(entry.record, entry.label, scores, _known(entry.objective))


class _Builder:
    def __init__(self, question: Question, entries: Sequence[Entry], draws: int):
        self.question = question
        self.entries = entries
        self.scored = [_Scored.of(entry, entry.scores) for entry in entries if entry.scores is not None]
        self.place = {scored.record.number: position for position, scored in enumerate(self.scored)}
        self.winner = next(entry for entry in entries if entry.record.number == question.winner)
        tasks = self.scored[0].scores.tasks if self.scored else {}
        self.tasks = {task: tasks[task] for task in (*question.factors, *question.guards) if task in tasks}
        samples = {task: Sample.of([s.scores.documents[task] for s in self.scored]) for task in self.tasks}
        self.documents = {task: sample.values.shape[1] for task, sample in samples.items()}
        self.resampling = Resampling(samples, question.seed, draws)
        # more is better in every measure
        ones = {task: {task: 1.0 if score.higher_is_better else -1.0} for task, score in self.tasks.items()}
        self.measures: dict[str, Measure] = {OBJECTIVE: question.factors, **ones} if self.tasks else {}
        self.noise = self._noise()

    def report(self) -> Report:
        compared = self._comparisons()
        sections = tuple(self._section(name, compared) for name in self.measures)
        claims = compared.get((OBJECTIVE, self.question.winner), [])
        documents = self._all_documents()
        labels = {entry.record.number: entry.label for entry in self.entries}
        missing = [
            f"the {what} ({labels[number]}) could not be scored on the holdout, so nothing is compared with it"
            for what, number in self.question.references.items()
            if number not in self.place
        ]
        return Report(
            run=self.question.run,
            winner=self.winner.label,
            winner_trial=self.question.winner,
            references={what: labels[number] for what, number in self.question.references.items()},
            sentence=sentence(self.winner.record, self.winner.error, claims, documents),
            improvement=bool(claims) and self.winner.record.name is None and all(c.verdict == BETTER for c in claims),
            sections=sections,
            noise=self.noise,
            repeat=self.question.repeat,
            notes=(*self.question.notes, *missing),
            guards=tuple(self._guard(task, *limit) for task, limit in self.question.guards.items()),
        )

    def _all_documents(self) -> int:
        """Those of the objective."""
        return sum(count for task, count in self.documents.items() if task in self.question.factors)

    def _guard(self, task: str, against: int, max_drop: float) -> GuardOutcome:
        label = next((entry.label for entry in self.entries if entry.record.number == against), f"trial {against}")
        winner, reference = self.place.get(self.question.winner), self.place.get(against)
        if winner is None or reference is None:
            return GuardOutcome(task, "", label, None, max_drop, UNSCORED)
        value = self._difference(task, (winner, reference))
        spread = self.resampling.difference_spread(self.measures[task], winner, reference)
        verdict = KEPT if value >= -max_drop - TIE else BROKEN
        return GuardOutcome(task, self.tasks[task].metric, label, _around(value, spread), max_drop, verdict)

    def _section(self, name: str, compared: Mapping[tuple[str, int], list[Comparison]]) -> Section:
        score = self.tasks.get(name)
        return Section(
            name=name,
            metric=score.metric if score else "",
            higher_is_better=score.higher_is_better if score else True,
            documents=self.documents.get(name, self._all_documents()),
            rows=tuple(self._row(name, entry, compared) for entry in self.entries),
        )

    def _row(self, name: str, entry: Entry, compared: Mapping[tuple[str, int], list[Comparison]]) -> Row:
        record = entry.record
        searched, known = record.scores.get(name), record.expected
        return Row(
            candidate=entry.label,
            trial=record.number,
            method=record.method,
            search=record.objective if name == OBJECTIVE else searched.value if searched else None,
            holdout=self._figure(name, entry),
            compared=tuple(compared.get((name, record.number), ())),
            error=entry.error,
            baseline=record.name is not None,
            expected=Figure(known.value, known.low, known.high) if known and name == OBJECTIVE else None,
        )

    def _figure(self, name: str, entry: Entry) -> Figure | None:
        place = self.place.get(entry.record.number)
        if place is None:
            return None
        scored = self.scored[place]
        measure = self.question.factors if name == OBJECTIVE else {name: 1.0}
        value = scored.objective if name == OBJECTIVE else scored.scores.tasks[name].value
        return _around(value, self.resampling.spread(measure, place))

    # --- comparisons ---

    def _comparisons(self) -> dict[tuple[str, int], list[Comparison]]:
        """(measure, trial) -> its differences to the references."""
        theirs = {what: self.place[number] for what, number in self.question.references.items() if number in self.place}
        ours = [e for e in self.scored if e.record.name is None or e.record.number == self.question.winner]
        pairs = [(entry, what) for entry in ours for what in theirs if self.place[entry.record.number] != theirs[what]]
        if not pairs:
            return {}
        names = list(self.measures)
        places = [(self.place[entry.record.number], theirs[what]) for entry, what in pairs]
        raw = self.resampling.p_values([self.measures[name] for name in names], places)
        adjusted = self._adjusted(raw, names, [entry.record.number for entry, _ in pairs])
        compared: dict[tuple[str, int], list[Comparison]] = {}
        for row, name in enumerate(names):
            for column, ((entry, what), place) in enumerate(zip(pairs, places, strict=True)):
                comparison = self._comparison(name, what, place, raw[row, column], adjusted[row, column])
                compared.setdefault((name, entry.record.number), []).append(comparison)
        return compared

    def _adjusted(self, raw: np.ndarray, names: Sequence[str], trials: Sequence[int]) -> np.ndarray:
        """Holm's correction, over the claims and over all the rest."""
        adjusted = np.full(raw.shape, np.nan)
        claim = np.array([[name == OBJECTIVE and trial == self.question.winner for trial in trials] for name in names])
        for family in (claim, ~claim):
            tested = family & np.isfinite(raw)
            adjusted[tested] = holm(raw[tested].tolist())
        return adjusted

    def _comparison(self, name: str, what: str, place: tuple[int, int], raw: float, adjusted: float) -> Comparison:
        measure = self.measures[name]
        value = self._difference(name, place)
        tested = math.isfinite(raw)
        return Comparison(
            reference=what,
            against=self.scored[place[1]].label,
            difference=_around(value, self.resampling.difference_spread(measure, *place)),
            p_raw=float(raw) if tested else None,
            p=float(adjusted) if tested else None,
            verdict=self._verdict(value, float(adjusted), self._floor(name)) if tested else UNTESTED,
        )

    def _difference(self, name: str, place: tuple[int, int]) -> float:
        """Of the figures that are shown; for a jackknife these are not what the documents' values add up to."""
        ours, theirs = (self.scored[position] for position in place)
        if name == OBJECTIVE:
            return ours.objective - theirs.objective
        (sign,) = self.measures[name].values()
        return sign * (ours.scores.tasks[name].value - theirs.scores.tasks[name].value)

    @staticmethod
    def _verdict(value: float, p: float, floor: float) -> str:
        if p >= LEVEL or abs(value) <= floor:
            return NOISE
        return BETTER if value > 0 else WORSE

    # --- the noise floor ---

    def _noise(self) -> tuple[Noise, ...]:
        winner = self.winner
        if winner.scores is None or winner.repeated is None:
            return ()
        total = self._all_documents()
        noise = [Noise(OBJECTIVE, _known(winner.objective), _known(winner.repeated_objective), total)]
        for task in self.tasks:
            first, second = Sample.of([winner.scores.documents[task], winner.repeated.documents[task]]).values
            # a jackknife's values may be NaN in both
            same = np.isclose(first, second, rtol=0, atol=0, equal_nan=True).reshape(len(first), -1).all(axis=1)
            figures = winner.scores.tasks[task].value, winner.repeated.tasks[task].value
            noise.append(Noise(task, *figures, documents=len(first), changed=int((~same).sum())))
        return tuple(noise)

    def _floor(self, name: str) -> float:
        return next((abs(noise.second - noise.first) for noise in self.noise if noise.name == name), 0.0)


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _around(value: float, spread: tuple[float, float] | None) -> Figure:
    return Figure(value, value + spread[0], value + spread[1]) if spread else Figure(value)
