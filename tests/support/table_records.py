"""Records of every kind. tests/data/table holds what the table of them is in each format that is a text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.record import Record


def scores(quiz: float, bits: float) -> dict[str, TaskScore]:
    return {
        "quiz": TaskScore(quiz, 0.0123456789, 10, "acc"),
        "bits": TaskScore(bits, None, 10, "bits_per_byte", higher_is_better=False),
    }


def record(number: int, name: str | None, state: str, recipe: str | None, *methods: str, **fields: Any) -> Record:
    rules = {"rules": [{"method": method} for method in methods]} if methods else None
    soup = fields.get("strategy") in ("greedy soup", "learned soup per group")
    method = name or (fields["strategy"] if soup else "+".join(dict.fromkeys(methods)))
    return Record(number=number, name=name, state=state, recipe=rules, recipe_id=recipe, method=method, **fields)


RECORDS = [
    record(
        0, "base", "complete", "aaaaaaaaaaaa", "linear", objective=0.0, stderr=0.1471, merge_seconds=0.5,
        score_seconds=1.0, scores=scores(0.4066666666666667, 2.2793),
    ),
    record(
        1, "code", "complete", "bbbbbbbbbbbb", "linear", objective=1 / 3, stderr=0.1, merge_seconds=0.25,
        score_seconds=2.0, scores=scores(0.5, 2.2),
    ),
    record(
        2, None, "complete", "cccccccccccc", "ties", "linear", "ties", objective=0.7, merge_seconds=1e-07,
        score_seconds=12345.678, scores=scores(0.1 + 0.2, 1e-05), strategy="study",
    ),
    record(
        3, None, "failed", "dddddddddddd", "dare_ties", error='made NaN in "x | y",\n2nd line', strategy="study"
    ),
    record(
        4, None, "complete", "eeeeeeeeeeee", "slerp", objective=0.7, stderr=0.05, merge_seconds=0.0,
        score_seconds=0.0, scores=scores(0.5, 1.9), strategy="learned soup per group",
    ),
    record(
        5, None, "pruned", "ffffffffffff", "linear", merge_seconds=0.1, score_seconds=0.2,
        stopped="after 24 of 48 documents, 0.1000 behind trial 2", strategy="random",
    ),
    record(
        6, None, "complete", "0123456789ab", "nearswap", objective=0.9, stderr=0.01, merge_seconds=3.0,
        score_seconds=4.0, scores=scores(0.9, 1.5), strategy="greedy soup",
        infeasible="safe acc 0.3000 is below its guard's 0.4000",
    ),
    record(7, None, "running", "ba9876543210", "karcher", strategy="study"),
    record(8, None, "waiting", None),
]  # fmt: skip
FRONT = [replace(record, front=record.number in (2, 4)) for record in RECORDS]
