"""Draws results/search-real.png from results/search-real.md: `python -m scripts.draw_result` (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts import real_result
from scripts.real_result import Candidate, RealResult, rounded

OUT = real_result.ROOT / "results" / "search-real.png"
# a card of its own ground, so that it reads the same on a light page and on a dark one
GROUND, EDGE, INK, QUIET, GRID = "#ffffff", "#d0d7de", "#1f2328", "#59636e", "#e6eaef"
WINNER, DEFAULT, AVERAGE, SINGLE = "#0969da", "#9a6700", "#57606a", "#cf222e"


def rows_of(result: RealResult) -> list[tuple[str, Candidate, str]]:
    """Label, candidate and colour of each row, from the top."""
    best, *others = result.defaults
    single, *rest = result.models
    return [
        ("found by the search", result.winner, WINNER),
        (f"best published default\n({best.name})", best, DEFAULT),
        *((f"default: {other.name}", other, DEFAULT) for other in others),
        ("plain average", result.average, AVERAGE),
        (f"best single model\n({single.name})", single, SINGLE),
        *((f"model {model.name}", model, SINGLE) for model in rest),
        ("the base they began from", result.base, AVERAGE),
    ]


def draw(result: RealResult, out: Path) -> None:
    """Writes the picture: a dot for each candidate, and the 95 % interval of its score."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["font.family"] = "DejaVu Sans"
    rows = rows_of(result)
    figure = Figure(figsize=(9.2, 5.4), dpi=160, facecolor=GROUND, edgecolor=EDGE, linewidth=2)
    axes = figure.add_axes((0.265, 0.115, 0.655, 0.70))
    axes.set_facecolor(GROUND)
    for place, (_, candidate, colour) in enumerate(rows):
        _dot(axes, place, candidate, colour)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9.5, color=INK)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.0)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.50", "0.75", "1"], fontsize=9.5, color=QUIET)
    axes.set_xlabel("share of right answers, mean of four tasks, on documents that the search never saw", color=QUIET)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.text(0.03, 0.925, "One merge instead of four models", fontsize=14.5, fontweight="bold", color=INK)
    below = "Four fine-tunes of SmolLM2-135M, two of which contradict each other. Dots: score; bars: 95 % interval."
    figure.text(0.03, 0.872, below, fontsize=9.5, color=QUIET)
    figure.savefig(out, facecolor=GROUND, edgecolor=EDGE, metadata={"Software": None})


def _dot(axes: Any, place: int, candidate: Candidate, colour: str) -> None:
    error = [[candidate.holdout - candidate.low], [candidate.high - candidate.holdout]]
    size = 9 if candidate.winner else 6.5
    axes.errorbar(
        candidate.holdout, place, xerr=error, fmt="o", color=colour, markersize=size, elinewidth=2.2, capsize=3.5
    )
    weight = "bold" if candidate.winner else "normal"
    axes.text(
        candidate.high + 0.018, place, rounded(candidate.holdout), va="center", fontsize=9.5, color=INK, weight=weight
    )


def main() -> None:
    draw(real_result.read(), OUT)
    print(OUT)


if __name__ == "__main__":
    main()
