from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from support.table_records import FRONT
from support.table_records import RECORDS as EVERY_KIND

from mergesearch.errors import UserError
from mergesearch.evaluate.scores import TaskScore
from mergesearch.results.record import Record, ranked, record_of
from mergesearch.results.table import FORMATS, PARQUET, frame, render, table_rows, write
from mergesearch.search.trials import State, Trial


def record(number: int, objective: float | None, quiz: float = 0.5, bits: float = 2.0, **extra: object) -> Record:
    scores = {
        "quiz": TaskScore(quiz, 0.01, 10, "acc"),
        "bits": TaskScore(bits, 0.02, 10, "bits_per_byte", higher_is_better=False),
    }
    state = "complete" if objective is not None else "failed"
    recipe = {"rules": [{"method": "ties"}, {"method": "linear"}, {"method": "ties"}]}
    method = extra.get("name") or "ties+linear"
    fields = {"scores": scores if objective is not None else {}, "recipe": recipe, "method": method, **extra}
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
    recipe = {"rules": [{"method": "ties"}, {"method": "linear"}, {"method": "ties"}]}
    soup = {"per": "group", "loss": "cross_entropy", "gradients": True}
    told = [
        record_of(Trial(number, State.WAITING, strategy, name=name, key=key, recipe_data=recipe), None)
        for number, (strategy, name, key) in enumerate(
            [
                ("learned_soup", None, soup),
                ("learned_soup", None, soup | {"gradients": False}),
                ("study", None, {"stage": "study", "sampler": "tpe"}),
                ("greedy_soup", None, {}),
                ("fisher", None, {}),
                ("baselines", "average", {}),
                ("random_control", None, {}),
                ("gone_away", None, {}),
            ]
        )
    ]
    assert [(row["strategy"], row["method"]) for row in table_rows(told)] == [
        ("learned soup per group by cross-entropy", "learned soup per group by cross-entropy"),
        ("learned soup per group", "learned soup per group"),
        ("study", "ties+linear"),
        ("greedy soup", "greedy soup"),
        ("fisher", "fisher"),
        ("baselines", "average"),
        ("random control", "ties+linear"),
        ("gone away", "ties+linear"),
    ]


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
    assert "| 0.7000 | 0.6000 ±0.0100 |" in lines[2] and "bits_per_byte ↓" in lines[0]
    assert "x \\| y" in lines[-1]


def test_an_empty_run_has_an_empty_table() -> None:
    assert all(render([], form) is not None for form in FORMATS if form != PARQUET)
    assert frame([]).empty


@pytest.mark.parametrize(("option", "part"), [({"sort": "quizz"}, "quiz"), ({"form": "html"}, "known: csv")])
def test_unknown_names_are_refused(option: dict[str, str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        render(RECORDS, **option)


# --- the same as before there was a DataFrame ---

VIEWS: dict[str, tuple[list[Record], dict[str, Any]]] = {
    "rank": (EVERY_KIND, {}),
    "front": (FRONT, {}),
    "bits": (EVERY_KIND, {"sort": "bits", "top": 6}),
    "state": (EVERY_KIND, {"sort": "state"}),
    "quiz": (EVERY_KIND, {"sort": "quiz"}),
    "fronts": (FRONT, {"sort": "front"}),
}


@pytest.mark.parametrize("form", ["csv", "md", "json"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_face_is_as_it_was(view: str, form: str) -> None:
    records, options = VIEWS[view]
    rendered = render(records, form, **options)
    with (Path(__file__).parent / "data" / "table" / f"{view}.{form}").open(encoding="utf-8", newline="") as file:
        assert rendered == file.read()


# --- the DataFrame ---


def test_the_frame_has_a_row_for_each_trial_and_typed_columns() -> None:
    table = frame(FRONT)
    assert sorted(table["trial"]) == list(range(9)) and list(table["rank"].dropna()) == [1, 2, 3, 4]
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    assert {kinds[name] for name in ("rank", "trial")} == {"Int64"} and kinds["front"] == "bool"
    numbers = ("objective", "objective_stderr", "quiz", "quiz_stderr", "bits", "bits_stderr", "seconds")
    assert {kinds[name] for name in (*numbers, "merge_seconds")} == {"float64"}
    assert {kinds[name] for name in ("method", "strategy", "state", "error", "recipe")} == {"string"}
    best = table[table["rank"] == 1].iloc[0]
    assert best["trial"] == 2 and best["quiz"] == 0.1 + 0.2 and pandas.isna(best["error"])


def test_the_columns_are_typed_where_nothing_is_known_yet() -> None:
    waiting = [record for record in EVERY_KIND if record.state == "waiting"]
    kinds = frame(waiting).dtypes
    assert str(kinds["objective"]) == "float64" and str(kinds["rank"]) == "Int64" and str(kinds["error"]) == "string"


@pytest.mark.parametrize("options", [{}, {"sort": "bits", "top": 3}])
def test_parquet_read_back_is_the_frame(tmp_path: Path, options: dict[str, Any]) -> None:
    write(FRONT, tmp_path / "table.parquet", PARQUET, **options)
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "table.parquet"), frame(FRONT, **options))


@pytest.mark.parametrize("form", ["csv", "md", "json"])
def test_a_file_holds_what_is_printed(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"table.{form}"
    file.write_text("an older one")
    write(EVERY_KIND, file, form, words=["note: for a terminal"])
    assert file.read_bytes().decode() == render(EVERY_KIND, form) + "\n"


def test_text_in_a_file_has_the_words_too(tmp_path: Path) -> None:
    write(EVERY_KIND, tmp_path / "table.txt", words=["note: all is well", "cost: little"])
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert lines[-2:] == ["note: all is well", "cost: little"]
    assert any("learned soup per group" in line and "0.7000" in line for line in lines)
    assert (tmp_path / "table.txt").read_text().startswith(str(render(EVERY_KIND)))


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "table.csv", tmp_path / "no" / "folder.csv", tmp_path / "file" / "in.csv"):
        with pytest.raises(UserError, match=r"cannot write .* name another file"):
            write(EVERY_KIND, out, "csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "table.csv"]


def test_parquet_is_no_text() -> None:
    with pytest.raises(UserError, match="--out"):
        render(EVERY_KIND, PARQUET)
