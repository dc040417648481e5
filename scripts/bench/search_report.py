"""The report of scripts/bench/search.py: a table (Markdown), every curve (CSV), and their means with bands (PNG)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import stats

from scripts.bench.yardstick import Candidate

MARKS = (100, 200, 400)
ABLATION = "auto with"  # how the names of searches begin that leave something out of auto, or change it
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """How the best candidate of one search with one seed became better.

    Attributes:
        candidates: in the order in which they were measured.
    """

    candidates: Sequence[Candidate]

    @cached_property
    def documents(self) -> int:
        """Document evaluations in all."""
        return sum(c.documents for c in self.candidates)

    @cached_property
    def points(self) -> list[tuple[int, float, float]]:
        """(document evaluations so far, search score, holdout score) each time a candidate became the best."""
        found, spent, best = [], 0, -math.inf
        for c in self.candidates:
            spent += c.documents
            if c.value is not None and c.value > best:
                best = c.value
                found.append((spent, best, math.nan if c.holdout is None else c.holdout))
        return found

    def at(self, documents: float) -> tuple[float, float]:
        """(search score, holdout score) of the best candidate after so many document evaluations; NaN before any."""
        reached = [point for point in self.points if point[0] <= documents]
        return reached[-1][1:] if reached else (math.nan, math.nan)

    def cost_of(self, score: float) -> float:
        """Document evaluations until the best search score is at least `score`; infinite where it never is."""
        return next((float(spent) for spent, value, _ in self.points if value >= score), math.inf)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; `stderr` and `half`, half the width of its 95 % t interval, are NaN for one seed."""

    value: float
    stderr: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        found = np.asarray(values, dtype=np.float64)
        if len(found) < 2:
            return cls(float(found.mean()) if len(found) else math.nan, math.nan, math.nan)
        stderr = float(found.std(ddof=1) / math.sqrt(len(found)))
        return cls(float(found.mean()), stderr, stderr * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)))

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.half) else f" ± {self.half:.4f}")


Curves = Mapping[str, Mapping[int, Curve]]


def write(measured: Mapping[str, Mapping[int, Sequence[Candidate]]], yardstick: str, results: Path, about: str) -> int:
    """Writes RESULTS.md, .csv and, where matplotlib is there, .png."""
    curves = {name: {seed: Curve(found) for seed, found in seeds.items()} for name, seeds in measured.items()}
    if yardstick not in curves:
        raise SystemExit(f"nothing of {yardstick}, the yardstick, was measured yet: run it first")
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = text(curves, yardstick, about, f"{results.name}.png")
    notes = results.with_suffix(".notes.md")  # what the figures alone do not say, written by hand
    lines += ["", notes.read_text(encoding="utf-8").rstrip()] if notes.is_file() else []
    results.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_csv(curves, results.with_suffix(".csv"))
    drawn = draw(curves, yardstick, results.with_suffix(".png"))
    print(f"wrote {results}.md, .csv" + (", .png" if drawn else "; no curves: pip install matplotlib"))
    return 0


# --- the table ---


def text(curves: Curves, yardstick: str, about: str, image: str) -> list[str]:
    return [
        "# The searches, compared",
        "",
        f"`python -m scripts.bench.search`; {about}. {seeds_in_words(curves)} The seed draws the split of the",
        "documents too: within a seed all searches see the same documents. A score is the mean over seeds ± half the",
        "width of its 95 % t interval. Cost is in document evaluations; a backward pass counts as two more. Search",
        "scores say what was optimised; holdout scores belong to the candidate that was best on the search documents.",
        "",
        f"`{yardstick}` is the yardstick: see scripts/bench/yardstick.py for what it is and when it was chosen.",
        "",
        *final_table(curves, yardstick),
        "",
        "*To reach*: document evaluations until the best search score is at least the yardstick's last one with the",
        "same seed, the median of the seeds that reach it, and as a share of the yardstick's whole cost.",
        "",
        "## On the holdout at equal document evaluations",
        "",
        "Within a seed, both searches after as many document evaluations as the cheaper one spent in all (*documents*:",
        "the mean of that over seeds); the mean difference and how many of its standard errors over seeds that is.",
        "",
        *paired_table(curves, yardstick),
        "",
        *ablations(curves),
        "## Along the way",
        "",
        *marks_table(curves, yardstick),
        "",
        f"![best holdout score against document evaluations]({image})",
    ]


def seeds_in_words(curves: Curves) -> str:
    counts = sorted({len(seeds) for seeds in curves.values()})
    if counts == [1]:
        return "One seed, so no intervals."
    return f"{counts[0]} seeds." if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds, see the table."


def final_table(curves: Curves, yardstick: str) -> list[str]:
    lines = [
        "| search | seeds | search score | holdout score | documents spent | reach the yardstick | to reach | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in curves.items():
        ends = [curve.at(math.inf) for curve in seeds.values()]
        spent = float(np.mean([curve.documents for curve in seeds.values()]))
        lines.append(
            f"| {name} | {len(seeds)} | {Mean.of([e[0] for e in ends])} | {Mean.of([e[1] for e in ends])} "
            f"| {spent:,.0f} | {reach_cells(seeds, curves[yardstick])} |"
        )
    return lines


def reach_cells(seeds: Mapping[int, Curve], yardstick: Mapping[int, Curve]) -> str:
    both = sorted(seeds.keys() & yardstick.keys())
    costs = {seed: seeds[seed].cost_of(yardstick[seed].at(math.inf)[0]) for seed in both}
    reached = [seed for seed in both if math.isfinite(costs[seed])]
    if not reached:
        return f"0 of {len(both)} | – | –"
    share = float(np.median([costs[seed] / yardstick[seed].documents for seed in reached]))
    cost = float(np.median([costs[seed] for seed in reached]))
    return f"{len(reached)} of {len(both)} | {cost:,.0f} | {share:.3f}"


def paired_table(curves: Curves, yardstick: str) -> list[str]:
    lines = [
        f"| search | documents | holdout score less that of {yardstick} | standard errors | seeds better |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in curves.items():
        found = differences(seeds, curves[yardstick])
        if name == yardstick or not found:
            continue
        mean = Mean.of([difference for _, difference in found])
        spent = float(np.mean([documents for documents, _ in found]))
        better = sum(difference > 0 for _, difference in found)
        lines.append(f"| {name} | {spent:,.0f} | {difference_cells(mean)} | {better} of {len(found)} |")
    return lines


def ablations(curves: Curves) -> list[str]:
    """What it costs to leave a part of auto out, or to change it."""
    changed = [name for name in curves if name.startswith(ABLATION) and "auto" in curves]
    if not changed:
        return []
    lines = [
        "## Each part of auto left out, or changed",
        "",
        "Less the score of `auto` with the same seed, after as many document evaluations as the cheaper one spent.",
        "",
        "| search | seeds | search score less that of auto | standard errors | on the holdout | standard errors |",
        "|---|---|---|---|---|---|",
    ]
    for name in changed:
        sides = [[d for _, d in differences(curves[name], curves["auto"], side)] for side in (0, 1)]
        if sides[0]:
            cells = [difference_cells(Mean.of(found)) for found in sides]
            lines.append(f"| {name} | {len(sides[0])} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def difference_cells(mean: Mean) -> str:
    """A mean difference, half its interval, and how many of its standard errors it is."""
    half = "" if math.isnan(mean.half) else f" ± {mean.half:.4f}"
    errors = f"{mean.value / mean.stderr:+.1f}" if mean.stderr > 0 else "–"
    return f"{mean.value:+.4f}{half} | {errors}"


def differences(seeds: Mapping[int, Curve], others: Mapping[int, Curve], side: int = 1) -> list[tuple[int, float]]:
    """(document evaluations, how much better the holdout score is, or with `side` 0 the search score) seed by seed,
    where both have spent what the cheaper one spent in all."""
    found = []
    for seed in sorted(seeds.keys() & others.keys()):
        spent = min(seeds[seed].documents, others[seed].documents)
        found.append((spent, seeds[seed].at(spent)[side] - others[seed].at(spent)[side]))
    return found


def marks_table(curves: Curves, yardstick: str) -> list[str]:
    """Scores after as many documents as 100, 200, 400 candidates of the yardstick take."""
    each = max(c.documents for curve in curves[yardstick].values() for c in curve.candidates)
    marks = [mark for mark in MARKS if any(curve.documents >= mark * each for curve in curves[yardstick].values())]
    heads = [f"{side} at {mark} x {each:,}" for mark in marks for side in ("search", "holdout")]
    lines = ["| search | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, seeds in curves.items():
        cells = []
        for mark in marks:
            ends = [curve.at(mark * each) for curve in seeds.values()]
            cells += [str(Mean.of([end[side] for end in ends])) for side in (0, 1)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines if marks else ["The yardstick has fewer than 100 candidates."]


# --- the curves ---


def write_csv(curves: Curves, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["search", "seed", "documents", "search_score", "holdout_score"])
        for name, seeds in curves.items():
            for seed, curve in sorted(seeds.items()):
                last = [(curve.documents, *curve.at(math.inf))] if curve.points else []
                writer.writerows([name, seed, *point] for point in [*curve.points, *last])


def band(seeds: Mapping[int, Curve], grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, its standard error) of the holdout score at each cost, NaN before every seed has a score."""
    found = [Mean.of([curve.at(documents)[1] for curve in seeds.values()]) for documents in grid]
    return np.array([mean.value for mean in found]), np.array([mean.stderr for mean in found])


def draw(curves: Curves, yardstick: str, path: Path) -> bool:
    """Draws the curves; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"searches": [n for n in curves if not n.startswith(ABLATION)]}
    if any(name.startswith(ABLATION) for name in curves):
        kept = [n for n in curves if n in ("auto", yardstick) or n.startswith(ABLATION)]
        panels["auto, each part left out in turn"] = kept
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 5.5), sharey=True, squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            draw_one(axis, name, curves[name], dashed=name == yardstick)
        axis.set(title=title, xscale="log", xlabel="document evaluations")
        axis.set_ylim(bottom=-0.05)  # below the base lie the first few candidates only
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("holdout score of the best so far, ± one standard error")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def draw_one(axis: object, name: str, seeds: Mapping[int, Curve], dashed: bool) -> None:
    started = [curve for curve in seeds.values() if curve.points]
    if not started:
        return
    low, high = max(curve.points[0][0] for curve in started), max(curve.documents for curve in started)
    grid = np.unique(np.geomspace(low, max(high, low + 1), 200).round())
    mean, error = band(seeds, grid)
    label = f"{name} ({len(started)} seeds)"
    (line,) = axis.step(grid, mean, where="post", label=label, linestyle="--" if dashed else "-")
    axis.fill_between(grid, mean - error, mean + error, step="post", alpha=0.12, linewidth=0, color=line.get_color())
