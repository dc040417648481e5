"""The README's pictures: the real result as its page states it, and a terminal as it was left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.text import Text

from scripts import draw_result, real_result, record_terminal

LIVE = """
from rich.console import Console
from rich.live import Live

console = Console()
with Live(console=console, auto_refresh=False) as live:
    for frame in range(5):
        live.update(f"frame {frame}", refresh=True)
        if frame == 2:
            console.print("[red]above[/red]")
for line in range(60):
    print("line", line)
raise SystemExit(3)
"""


def test_the_real_result_is_read_from_its_page() -> None:
    result = real_result.read()
    assert (result.winner.holdout, result.winner.low, result.winner.high) == (0.8925, 0.8625, 0.9225)
    assert (result.defaults[0].name, result.defaults[0].holdout) == ("task arithmetic 0.3", 0.725)
    assert (result.average.holdout, result.base.holdout) == (0.6675, 0.0675)
    assert [model.name for model in result.models] == ["iso", "us", "number", "class"]
    assert result.winner.tasks == {"class": 0.86, "number": 0.96, "iso": 0.82, "us": 0.93}
    labels = [label for label, _, _ in draw_result.rows_of(result)]
    assert len(labels) == 13 and labels[0] == "found by the search" and "default: ties 0.2" in labels


def test_halves_are_rounded_up() -> None:
    assert [real_result.rounded(score) for score in (0.725, 0.315, 0.8925)] == ["0.73", "0.32", "0.89"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'mergesearch[docs]'")
    draw_result.draw(real_result.read(), tmp_path / "real.png")
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_a_terminal_is_recorded_as_it_was_left() -> None:
    pytest.importorskip("pyte", reason="pip install 'mergesearch[docs]'")
    written, status = record_terminal.run([sys.executable, "-c", LIVE], width=40)
    lines = record_terminal.screen(written, width=40)
    assert status == 3
    assert [line.plain for line in lines] == ["above", "frame 4", *(f"line {number}" for number in range(60))]
    assert any("color(1)" in str(span.style) or "red" in str(span.style) for span in lines[0].spans)


def test_a_long_output_is_shown_by_head_and_tail() -> None:
    lines = [Text(str(number)) for number in range(100)]
    assert record_terminal.shortened(lines, most=100) == lines
    short = [line.plain for line in record_terminal.shortened(lines, most=6, tail=3)]
    assert short == ["0", "1", "… 95 more lines …", "97", "98", "99"]


def test_the_svg_asks_for_nothing_from_elsewhere() -> None:
    drawn = record_terminal.svg([Text("a < b", style="bold red"), Text("± 0.1")], "title", width=20)
    assert drawn.startswith("<svg") and "a&#160;&lt;&#160;b" in drawn and "±&#160;0.1" in drawn
    assert "url(http" not in drawn and "@font-face" not in drawn
