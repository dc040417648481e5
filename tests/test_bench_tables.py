"""The tables of results/*.md."""

from __future__ import annotations

import pandas as pd
import pytest

from scripts.bench.shared import tables


def test_rows_stand_under_their_titles() -> None:
    assert tables.table(["a", "over", "over"], [["x", 1, "**2**"], ["y", "", "-"]]) == [
        "| a | over | over |",
        "|---|---|---|",
        "| x | 1 | **2** |",
        "| y |  | - |",
    ]


def test_a_column_has_a_format_and_texts_stay_as_they_are() -> None:
    formats = {"share": "{:.1%}", "held": "{:,.0f} MiB"}
    rows = [["[a](b.md)", 0.256, 1234.4], ["one \\| two", "-", 5]]
    assert tables.table(["name", "share", "held"], rows, formats)[2:] == [
        "| [a](b.md) | 25.6% | 1,234 MiB |",
        "| one \\| two | - | 5 MiB |",
    ]


def test_without_rows_the_titles_stand() -> None:
    assert tables.table(["a", "b"], [], {"b": "{:.2f}"}) == ["| a | b |", "|---|---|"]


def test_a_frame_of_a_run_is_printed_as_it_is() -> None:
    assert tables.lines(pd.DataFrame({"trial": [0, 1], "objective": [0.5, None]})) == [
        "| trial | objective |",
        "|---|---|",
        "| 0 | 0.5 |",
        "| 1 | nan |",
    ]


def test_each_row_has_a_cell_for_each_title() -> None:
    with pytest.raises(ValueError, match="columns"):
        tables.table(["a", "b"], [["x"]])
