"""Searches simulated document by document, for measuring how often a report is right.

A document has a difficulty; a candidate gets it right with a probability that is the same for all candidates, plus the
true gain of the proposals. Used by test_report_calibration.py and by scripts/bench/calibration.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergesearch.config import Config
from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.results.record import Record
from mergesearch.results.report import Entry, Question, Report, build
from mergesearch.results.report.data import AVERAGE, SINGLE
from mergesearch.results.report.finalists import choose

BASELINES = ("base", "a", "b", "c", "d", "average")
CONFIG = Config(base_model="base", models={name: name for name in "abcd"}, tasks=[{"task": "quiz"}])


@dataclass(frozen=True)
class World:
    """What is simulated.

    Attributes:
        documents: of the holdout.
        differ: the share of documents on which two equal candidates differ.
        gain: by how much every proposal is truly better than every baseline.
        searched: search documents.
        proposals: how many the search makes.
    """

    documents: int
    differ: float
    gain: float = 0.0
    searched: int = 200
    proposals: int = 40

    def answers(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """[baselines + proposals, count] of 0 and 1."""
        # a document is settled (all agree) or open (a coin for each candidate, which differ on half of them)
        chance = np.where(rng.random(count) < 2 * self.differ, 0.5, (rng.random(count) < 0.6).astype(float))
        right = rng.random((len(BASELINES) + self.proposals, count)) < chance
        helped = rng.random(count) < self.gain / max(1e-12, 1 - chance.mean())
        right[len(BASELINES) :] |= helped
        return right.astype(np.float64)


def simulate(world: World, seed: int, draws: int) -> Report:
    """One search and its report, on the way of the command: choose on the search documents, build from the holdout."""
    rng = np.random.default_rng(seed)
    searched = world.answers(world.searched, rng).mean(axis=1)
    records = [_record(number, value) for number, value in enumerate(searched.tolist())]
    chosen = choose(records, CONFIG, 1)
    holdout = world.answers(world.documents, rng)
    references = {SINGLE: chosen.single, AVERAGE: chosen.average}
    question = Question(
        run="simulated",
        winner=chosen.winner.number,
        references={what: found.number for what, found in references.items() if found is not chosen.winner},
        factors={"quiz": 1.0},
        seed=seed,
    )
    return build(question, [_entry(record, holdout[record.number]) for record in chosen.records], draws)


def _record(number: int, value: float) -> Record:
    name = BASELINES[number] if number < len(BASELINES) else None
    scores = {"quiz": TaskScore(value, None, 0, "acc")}
    return Record(number, name, "complete", objective=value, scores=scores, recipe_id=str(number))


def _entry(record: Record, values: np.ndarray) -> Entry:
    score = TaskScore(float(values.mean()), None, len(values), "acc")
    documents = DocumentScores(list(range(len(values))), values, "mean")
    return Entry(record, Scores({"quiz": score}, {"quiz": documents}), objective=score.value)


def claims_any(report: Report) -> bool:
    """Whether it claims that the winner of the search is better than anything it is compared with."""
    (winner,) = (row for row in report.sections[0].rows if row.candidate == report.winner)
    return any(comparison.verdict == "better" for comparison in winner.compared)
