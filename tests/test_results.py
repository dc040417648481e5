from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console

from mergesearch.errors import UserError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.record import Record, ranked
from mergesearch.results.table import FORMATS, render, table_rows


def record(number: int, objective: float | None, quiz: float = 0.5, bits: float = 2.0, **extra: object) -> Record:
    scores = {
        "quiz": TaskScore(quiz, 0.01, 10, "acc"),
        "bits": TaskScore(bits, 0.02, 10, "bits_per_byte", higher_is_better=False),
    }
    state = "complete" if objective is not None else "failed"
    recipe = {"rules": [{"method": "ties"}, {"method": "linear"}, {"method": "ties"}]}
    fields = {"scores": scores if objective is not None else {}, "recipe": recipe, **extra}
    return Record(number=number, name=fields.pop("name", None), state=state, objective=objective, **fields)


RECORDS = [
    record(0, 0.0, 0.4, 2.5, name="base", merge_seconds=0.5, score_seconds=1.0),
    record(1, 0.7, 0.6, 2.1, stderr=0.05),
    record(2, None, error="ties made NaN in x | y"),
    record(3, 0.7, 0.5, 1.9),
]


def test_the_best_stand_first_and_failures_last() -> None:
    assert [r.number for r in ranked(RECORDS)] == [1, 3, 0, 2]
    rows = table_rows(RECORDS)
    assert [row["rank"] for row in rows] == [1, 2, 3, None]
    assert [row["method"] for row in rows] == ["ties+linear", "ties+linear", "base", "ties+linear"]
    assert rows[2]["seconds"] == 1.5


def test_what_breaks_a_guard_comes_after_all_that_do_not_and_says_why() -> None:
    broken = record(4, 0.9, infeasible="safe acc 0.3000 is below its guard's 0.4000")
    assert [r.number for r in ranked([*RECORDS, broken])] == [1, 3, 0, 4, 2]
    row = table_rows([*RECORDS, broken])[3]
    assert row["rank"] is None and row["state"] == "infeasible" and "below its guard's 0.4000" in row["error"]


@pytest.mark.parametrize(
    ("column", "order"),
    [("trial", [0, 1, 2, 3]), ("quiz", [1, 3, 0, 2]), ("bits", [3, 1, 0, 2]), ("objective", [1, 3, 0, 2])],
)
def test_sorting_puts_the_better_first(column: str, order: list[int]) -> None:
    assert [row["trial"] for row in table_rows(RECORDS, sort=column)] == order


def test_soups_are_known_by_their_names_and_proposals_by_their_methods() -> None:
    made = [record(5, 0.1, strategy="learned soup per group"), record(6, 0.0, strategy="study")]
    assert [row["method"] for row in table_rows(made)] == ["learned soup per group", "ties+linear"]
    assert [row["strategy"] for row in json.loads(render(made, "json"))] == ["learned soup per group", "study"]


def test_top_cuts() -> None:
    assert [row["trial"] for row in table_rows(RECORDS, top=2)] == [1, 3]


def test_csv_and_json_hold_every_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(render(RECORDS, "csv"))))
    data = json.loads(render(RECORDS, "json"))
    for row, same in zip(rows, data, strict=True):
        assert row["trial"] == str(same["trial"])
        assert (float(row["bits"]) if row["bits"] else None) == same["bits"]
    assert data[0]["bits_stderr"] == 0.02 and data[-1]["error"] == "ties made NaN in x | y"


def test_markdown_is_a_table() -> None:
    lines = render(RECORDS, "md").splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "0.7000 ±0.0500" in lines[2] and "bits_per_byte ↓" in lines[0]
    assert "x \\| y" in lines[-1]


def test_text_fits_a_terminal_and_hides_nothing() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(render(RECORDS))
    text = console.file.getvalue()
    assert "ties+linear" in text and "…" not in text and "0.7000 ±0.0500" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_an_empty_run_has_an_empty_table() -> None:
    assert [render([], form) is not None for form in FORMATS] == [True] * 4


@pytest.mark.parametrize(("option", "part"), [({"sort": "quizz"}, "quiz"), ({"form": "html"}, "known: csv")])
def test_unknown_names_are_refused(option: dict[str, str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        render(RECORDS, **option)
