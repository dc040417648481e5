"""The table in a terminal: no line longer than it, no digit cut, and columns left out in the order that is stated."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from support.table_records import FRONT, RECORDS

from mergesearch.evaluate.scores import DocumentScores, Scores, TaskScore
from mergesearch.evaluate.statistics import difference
from mergesearch.results.bars import bars
from mergesearch.results.grid import Column, folded, lay_out, lines_of
from mergesearch.results.margins import Margins
from mergesearch.results.record import Record
from mergesearch.results.table import render, table_rows
from mergesearch.search.objective import Objective, Scale
from mergesearch.search.store import RunFolder

WIDTHS = (60, 80, 100, 120, 200, 400)
LONG = (
    "mmlu_abstract_algebra", "hellaswag", "arc_challenge", "winogrande", "truthfulqa_mc2", "gsm8k", "boolq",
    "/home/somebody/tasks/a_task_with_a_very_long_name.yaml", "piqa", "openbookqa", "lambada_openai", "wikitext",
)  # fmt: skip


def record(number: int, objective: float | None, method: str, tasks: Sequence[str] = LONG, **fields: Any) -> Record:
    scores = {
        task: TaskScore(0.1 + 0.013 * number + 0.0017 * place, 0.01, 10, "acc") for place, task in enumerate(tasks[:-1])
    }
    scores[tasks[-1]] = TaskScore(1234.5678 + number, None, 10, "word_perplexity", higher_is_better=False)
    fields = {"name": None, "state": "complete", "merge_seconds": 0.25, "score_seconds": 1234.5, **fields}
    scores = scores if fields["state"] == "complete" else {}
    return Record(number=number, objective=objective, method=method, scores=scores, **fields)


def many(tasks: Sequence[str]) -> list[Record]:
    """Records of every kind."""
    reason = "made NaN in model.layers.11.self_attn.q_proj.weight, which no merge of these models should ever do"
    return [
        record(0, 0.0, "base", tasks, name="base"),
        record(1, 0.5, "code-llama-7b-instruct-hf", tasks, name="code-llama-7b-instruct-hf", front=True),
        record(2, -0.3333, "average", tasks, name="average"),
        record(3, math.nan, "ties+linear+dare_ties+task_arithmetic", tasks),
        record(4, -123.4567, "learned soup per tensor by cross-entropy", tasks, infeasible="safe acc 0.3000 is low"),
        record(5, None, "dare_ties", tasks, state="failed", error=reason),
        record(6, None, "karcher", tasks, state="pruned", stopped="after 24 of 48 documents, 0.1000 behind trial 2"),
        record(7, None, "della", tasks, state="failed", error=reason),
        record(8, 0.9, "task_arithmetic 0.35", tasks, front=True),
        record(9, None, "", tasks, state="waiting"),
        record(1234, None, "linear", tasks, state="running"),
    ]


SETS = {
    "every kind": RECORDS,
    "a front": FRONT,
    "one task": many(LONG[-1:]),
    "four tasks": many(LONG[-4:]),
    "twelve tasks": many(LONG),
    "below zero": [replace(r, objective=r.objective and r.objective - 1000) for r in many(LONG[:5])],
    "nothing scored": [r for r in RECORDS if not r.scores],
}


def margins_of(records: Sequence[Record], folder: Path) -> Margins:
    """Over the model of these records, with documents for every complete trial."""
    tasks = [task for task in records[0].scores] if records[0].scores else []
    for each in records:
        documents = {
            task: DocumentScores(list(range(10)), np.random.default_rng([each.number, n]).random(10), "mean")
            for n, task in enumerate(tasks)
        }
        if each.objective is not None:
            Scores(each.scores, documents).save_documents(folder / "scores" / f"{each.number:05d}.npz")
    models = [each.name for each in records if each.name not in (None, "base", "average")]
    objective = Objective(dict.fromkeys(tasks, 1.0), dict.fromkeys(tasks, Scale(0.0, 0.25)))
    return Margins.of_run(records, models, RunFolder(folder), objective)


def printed(table: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", SETS)
def test_no_line_is_too_long_and_no_digit_is_lost(kind: str, width: int, tmp_path: Path) -> None:
    table = render(SETS[kind], margins=margins_of(SETS[kind], tmp_path))
    lines = printed(table, width)
    assert max(map(cell_len, lines)) <= width
    layout = lay_out(table.columns, width)
    numeric = [column for column in layout.columns if not column.words and column.name != "bars"]
    below = iter(lines[next(place for place, line in enumerate(lines) if line.startswith("─")) + 1 :])
    for row in range(len(SETS[kind])):
        cells = [column.cells[row] for column in numeric if column.cells[row]]
        # each row has one line with all of its numbers, in the order of the columns, and the rows follow each other
        assert any(_in_order(cells, line.split()) for line in below), cells


def _in_order(wanted: Sequence[str], words: Sequence[str]) -> bool:
    rest = iter(words)
    return all(any(word == cell for word in rest) for cell in wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", SETS)
def test_methods_and_titles_are_whole_when_their_lines_are_put_together(kind: str, width: int, tmp_path: Path) -> None:
    table = render(SETS[kind], margins=margins_of(SETS[kind], tmp_path))
    layout = lay_out(table.columns, width)
    for column, wide in zip(layout.columns, layout.widths, strict=True):
        for cell in column.cells:
            lines = folded(cell, wide, column.words)
            assert "".join("".join(lines).split()) == "".join(cell.split())
            assert all(cell_len(line) <= wide for line in lines)


@pytest.mark.parametrize("kind", SETS)
def test_columns_are_left_out_in_the_stated_order(kind: str, tmp_path: Path) -> None:
    table = render(SETS[kind], margins=margins_of(SETS[kind], tmp_path))
    names = [column.name for column in table.columns]
    tasks = [task for task in (SETS[kind][0].scores or {})]
    vs = next((name for name in names if name.startswith("vs ")), "vs")
    order = [name for name in ("bars", "seconds", "rank", "±", vs, *reversed(tasks)) if name in names]
    for width in range(30, 400, 7):
        gone = {column.name for column in lay_out(table.columns, width).left_out}
        assert gone == set(order[: len(gone)])
        shown = {column.name for column in lay_out(table.columns, width).columns}
        assert {"trial", "objective", "method", "state"} <= shown


def test_the_last_line_says_what_was_left_out_and_nothing_where_nothing_was() -> None:
    table = render(many(LONG))
    text = " ".join(" ".join(printed(table, 80)).split())
    assert re.search(r"left out: .*rank.*wikitext.*; a terminal of \d+ columns shows them, and --format csv$", text)
    needed = int(re.search(r"a terminal of (\d+) columns", text)[1])
    assert "left out" not in "".join(printed(table, needed)) and "left out" in "".join(printed(table, needed - 1))
    assert "left out" not in str(table) and all(task in str(table) for task in LONG)


def test_twelve_tasks_in_80_columns_show_some_of_them() -> None:
    layout = lay_out(render(many(LONG)).columns, 80)
    shown = [column.name for column in layout.columns]
    assert shown[:3] == ["trial", "marks", "objective"] and shown[-2:] == ["method", "state"]
    assert shown[3:-2] == list(LONG[: len(shown) - 5]) and len(shown[3:-2]) >= 4


def test_reasons_stand_once_beneath_with_their_trials() -> None:
    text = str(render(many(LONG)))
    assert text.count("made NaN") == 1 and "failed, trials 5, 7: made NaN" in text
    assert "infeasible, trial 4: safe acc 0.3000 is low" in text
    assert "pruned, trial 6: after 24 of 48 documents" in text
    states = [line.split()[-1] for line in text.splitlines() if re.match(r"\s*(\d+|-)\s+\d+", line)]
    assert states.count("failed") == 2 and states.count("pruned") == 1


def test_many_reasons_are_counted() -> None:
    failed = [record(n, None, "linear", state="failed", error=f"error {n}") for n in range(20)]
    same = [record(n, None, "linear", state="failed", error="no memory") for n in (30, 31, 32, 40)]
    text = str(render([*same, *failed]))
    assert "and 13 reasons more: --format csv" in text
    assert "failed, trials 30-32, 40: no memory" in str(render(same))


def test_baselines_are_marked_and_the_marks_explained(tmp_path: Path) -> None:
    records = many(LONG[:3])
    text = str(render(records, margins=margins_of(records, tmp_path)))
    marks = {line.split()[1]: line.split()[2] for line in text.splitlines() if re.match(r"\s*(\d+|-)\s+\d+", line)}
    assert (marks["0"], marks["1"], marks["2"], marks["8"]) == ("B", "M*", "D", "*")
    assert "B the base; M a single model; D a default, not searched; * no other is as good" in text
    assert "the base" not in str(render([records[-3]]))


# --- against the best single model ---


def test_the_margin_is_the_paired_one_of_the_objective(tmp_path: Path) -> None:
    tasks = ("quiz", "more", "bits")
    records = [record(0, 0.0, "base", tasks, name="base"), record(1, 0.4, "a", tasks, name="a"),
               record(2, 0.3, "b", tasks, name="b"), record(3, 0.65, "ties", tasks)]  # fmt: skip
    margins = margins_of(records, tmp_path)
    assert margins.single is records[1] and margins.of(records[1]) is None
    found = margins.of(records[3])
    documents = [
        [np.random.default_rng([number, n]).random(10) for n in range(len(tasks))] for number in (3, 1)
    ]  # fmt: skip
    errors = [difference(a, b, "mean").stderr / 0.25 / 3 for a, b in zip(*documents, strict=True)]
    assert found.value == pytest.approx(0.25) and found.documents == 30
    assert found.stderr == pytest.approx(math.sqrt(sum(error**2 for error in errors)))
    text = str(render(records, margins=margins))
    assert f"+0.2500  {found.stderr:.4f}" in text
    assert f"Trial 3: +0.2500 ± {found.stderr:.4f} (one standard error on these documents)" in text


def test_without_documents_there_is_no_error_and_without_models_no_margin(tmp_path: Path) -> None:
    records = [record(0, 0.0, "base", name="base"), record(1, 0.4, "a", name="a"), record(3, 0.65, "ties")]
    margins = margins_of(records, tmp_path)
    for file in (tmp_path / "scores").iterdir():
        file.unlink()
    assert margins.of(records[2]).stderr is None
    text = str(render(records, margins=margins))
    assert "+0.2500" in text and "±" not in text.split("vs a: the objective")[0]
    alone = Margins.of_run(records, ["b"], RunFolder(tmp_path), margins.objective)
    assert alone.of(records[2]) is None and "vs" not in str(render(records, margins=alone))
    early = Margins.of_run(records, ["a"], RunFolder(tmp_path), None)
    assert early.of(records[2]) is None


def test_documents_without_values_have_no_error(tmp_path: Path) -> None:
    records = [record(1, 0.4, "a", ("quiz", "bits"), name="a"), record(3, 0.65, "ties", ("quiz", "bits"))]
    margins = margins_of(records, tmp_path)
    blind = DocumentScores(list(range(10)), np.full(10, np.nan), "jackknife")
    for each in records:
        Scores({}, {"quiz": blind, "bits": blind}).save_documents(tmp_path / "scores" / f"{each.number:05d}.npz")
    assert margins.of(records[1]).stderr is None


def test_a_model_that_wins_is_ahead_of_itself_by_nothing(tmp_path: Path) -> None:
    records = [record(1, 0.9, "a", name="a"), record(3, 0.65, "ties")]
    text = str(render(records, margins=margins_of(records, tmp_path)))
    assert "vs a: the objective minus that of a, the best single model; ± one" in text and "-0.2500" in text


# --- bars ---


def test_bars_are_longer_for_more_and_go_left_below_zero() -> None:
    drawn = bars([1.0, 0.5, 0.0, -0.25, -9.0, None, math.nan, math.inf], 12)
    assert drawn[0] == " " * 4 + "█" * 8 and drawn[1] == " " * 4 + "█" * 4 and drawn[2] == " " * 4
    assert drawn[3] == "  ██" and drawn[4] == "◂███" and drawn[5:] == ["", "", ""]
    assert all(len(bar) <= 12 for bar in drawn)


def test_bars_of_what_is_all_below_zero_begin_at_the_worst() -> None:
    assert [len(bar) for bar in bars([-1.0, -2.0, -3.0], 10)] == [10, 5, 0]
    assert bars([-2.0, -2.0], 10) == ["", ""] and bars([0.0], 10) == [""] and bars([]) == []


@pytest.mark.parametrize("values", [[3.0, 2.9, 0.01], [0.7, -0.001], [1e-9, -5.0], [-1e-9, -5.0], [5.0, -5.0, 4.99]])
def test_no_bar_is_too_wide(values: list[float]) -> None:
    assert all(len(bar) <= 16 for bar in bars(values))


# --- the grid ---


def test_words_fold_after_their_joints_and_numbers_never() -> None:
    assert folded("learned soup per tensor by cross-entropy", 11) == [
        "learned",
        "soup per",
        "tensor by",
        "cross-",
        "entropy",
    ]
    assert folded("task_arithmetic 0.35", 11) == ["task_", "arithmetic", "0.35"]
    assert folded("breadcrumbs", 4) == ["brea", "dcru", "mbs"]
    assert folded("[0.1234, 0.5678]", 9, words=False) == ["[0.1234,", "0.5678]"]
    assert folded("123456789.1234", 4, words=False) == ["123456789.1234"]
    assert folded("", 4) == [""] and folded("a\nb", 4) == ["a", "b"]


def test_a_wide_enough_grid_gives_every_column_what_it_wants() -> None:
    columns = [Column("a", "a title", ["1", "22"]), Column("b", "b", ["some words", "x"], words=True, right=False)]
    assert [line.plain for line in lines_of(lay_out(columns))] == [
        "a title  b", "───────────────────", "      1  some words", "     22  x",
    ]  # fmt: skip
    assert lay_out(columns, 1).left_out == ()


def test_a_large_table_is_laid_out_once_for_each_column(tmp_path: Path) -> None:
    """Thousands of rows are measured once, not for every layout that is tried."""
    measured: list[str] = []

    class Counted(str):
        def splitlines(self, keepends: bool = False) -> list[str]:
            measured.append(self)
            return super().splitlines(keepends)

    columns = [Column(f"c{n}", f"c{n}", [Counted("0.1234")] * 10, drop=n) for n in range(20)]
    lay_out(columns, 40)
    assert len(measured) <= 20 * 10 * 3


def test_every_row_of_the_table_is_there() -> None:
    assert len(table_rows(many(LONG))) == sum(
        bool(re.match(r"\s*(\d+|-)\s+\d+", line)) for line in str(render(many(LONG))).splitlines()
    )
