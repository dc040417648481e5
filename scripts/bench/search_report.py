"""The page of scripts/bench/search.py: tables (Markdown) and, for each pool, the curves' means with bands (PNG)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from scipy import stats

from scripts.bench import search_rows
from scripts.bench.search_rows import Curve
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

MARKS = (100, 200, 400)
ABLATION = "auto with"  # how the names of searches begin that leave something out of auto, or change it
ERRORS = "standard errors"
CONFIDENCE = 0.95
EARLIER = " (0.1)"  # how the names of searches end that version 0.1 ran
# what a search is called on the page where its name would say too little: it scores the base, each model alone, their
# average, the published defaults and the slerp of the two best, and gives whoever is best
LABELS = {"published defaults": "best baseline"}
# its section comes first, and its picture has no other name
FIRST_POOL = "zoo1"


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


# search -> seed -> curve, of one pool
Curves = Mapping[str, Mapping[int, Curve]]


def by_pool(found: search_rows.Curves, order: Sequence[str]) -> dict[str, dict[str, dict[int, Curve]]]:
    """Pool -> search -> seed -> curve; searches in the order that is given, and then whatever else there is."""
    names = [*order, *sorted({key.search for key in found} - set(order))]
    pools: dict[str, dict[str, dict[int, Curve]]] = {}
    for key, curve in sorted(found.items(), key=lambda pair: (names.index(pair[0].search), pair[0].seed)):
        pools.setdefault(key.pool, {}).setdefault(key.search, {})[key.seed] = curve
    return dict(sorted(pools.items(), key=lambda pair: (pair[0] != FIRST_POOL, pair[0])))


def write(
    found: search_rows.Curves,
    yardstick: str,
    results: Path,
    order: Sequence[str] = (),
    judged: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Writes RESULTS.md of finished searches, and where matplotlib is there a picture for each pool: RESULTS.png of the
    first, RESULTS-pool-POOL.png of others, as search-real.png is of another page.

    Args:
        judged: each judging pool, and how often it was looked at; they come last, under a heading of their own.
    """
    pools = dict(sorted(by_pool(found, order).items(), key=lambda pair: pair[0] in judged))
    if not pools:
        raise SystemExit(f"no search is finished yet, so {results}.md is not written")
    results.parent.mkdir(parents=True, exist_ok=True)
    lines, drawn = list(INTRODUCTION), False
    for pool, curves in pools.items():
        if pool in judged and JUDGING[0] not in lines:
            lines += ["", *JUDGING]
        image = (
            results.with_suffix(".png") if pool == FIRST_POOL else results.with_name(f"{results.name}-pool-{pool}.png")
        )
        drawn = draw(curves, yardstick, image)
        shown = text(pool, curves, yardstick, image.name if drawn or image.is_file() else None)
        if pool in judged:
            shown[1:1] = ["", looked_at(judged[pool])]
        lines += ["", *shown]
    lines += notes_of(results)
    results.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {results}.md" + (" and .png" if drawn else "; no curves: pip install matplotlib"))


# --- the table ---

INTRODUCTION = """\
# The searches, compared

`python -m scripts.bench.search`, which runs what is missing in search.csv and prints this page. The seed draws the
split of the documents too: within a seed all searches see the same documents. A score is the mean over seeds ± half
the width of its 95 % t interval. Cost is in document evaluations, a backward pass counts as two more, and in seconds
of building, learning and scoring, where they were recorded. *Search score*: the highest on the search documents,
which says what was optimised. *Holdout score*: of whom the search gives, for a yardstick whoever has the highest
search score, for mergesearch's own whoever is expected to score best elsewhere (winner.md). *Commit*: the code that
ran it, where that was recorded; rows of another code than today's are not run again by themselves. *a then b*: cut
short under a, it went on under b.

Yardsticks: `cmaes` as in mergekit-evolve, `genetic` as in mergenetic, `random` and `tpe`, over TIES' weights and
densities per range of layers, see scripts/bench/yardstick.py for what each is and when it was chosen; `greedy_soup`;
`entropy_soup` as in AdaMerging. `best baseline`: what a run of baselines alone gives, whichever it is of the base, each
model alone, their plain average, the published defaults and the slerp of the two best models; in search.csv and for
--only it is `published defaults`. *(0.1)* after a name: as version 0.1 ran it.""".splitlines()


JUDGING = """\
## Judging pools

Nothing was chosen by these: development looks at the pools above alone. Each run of searches on one of them is a row of
judging.md.""".splitlines()


def looked_at(times: int) -> str:
    return f"Looked at {times} time{'' if times == 1 else 's'}."


def text(pool: str, curves: Curves, yardstick: str, image: str | None) -> list[str]:
    compared = (
        []
        if yardstick not in curves
        else [
            "### On the holdout at equal document evaluations",
            "",
            "Within a seed, both searches after as many document evaluations as the cheaper one spent in all",
            "(*documents*: the mean of that over seeds); the mean difference, and in standard errors over seeds.",
            "",
            *paired_table(curves, yardstick),
            "",
        ]
    )
    return [
        f"## Pool {pool}",
        "",
        f"{seeds_in_words(curves)}",
        "",
        *final_table(curves, yardstick),
        "",
        "*To reach*: document evaluations until the highest search score is at least the last one of "
        f"`{yardstick}` with the",
        "same seed, the median of the seeds that reach it, and as a share of its whole cost.",
        "",
        *given(curves),
        *compared,
        *rivals(curves),
        *ablations(curves),
        *ablations(curves, EARLIER),
        *since(curves),
        "### Along the way",
        "",
        *marks_table(curves),
        *(["", f"![best holdout score against document evaluations]({image})"] if image else []),
    ]


def seeds_in_words(curves: Curves) -> str:
    counts = sorted({len(seeds) for seeds in curves.values()})
    if counts == [1]:
        return "One seed, so no intervals."
    return f"{counts[0]} seeds." if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds, see the table."


def final_table(curves: Curves, yardstick: str) -> list[str]:
    titles = ("search", "seeds", "search score", "holdout score", "documents", "seconds")
    rows = []
    for name, seeds in curves.items():
        ends = [curve.at(math.inf) for curve in seeds.values()]
        spent = float(np.mean([curve.documents for curve in seeds.values()]))
        means = [Mean.of([end[side] for end in ends]) for side in (0, 1)]
        reached = reach_cells(seeds, curves.get(yardstick, {}))
        rows.append(
            [label(name), len(seeds), *means, f"{spent:,.0f}", seconds_cell(seeds), *reached, commits_cell(seeds)]
        )
    return tables.table((*titles, "reach the yardstick", "to reach", "share", "commit"), rows)


def label(name: str) -> str:
    return LABELS.get(name, name)


def given(curves: Curves) -> list[str]:
    """What the candidates are that the searches give in the end, and with how many seeds."""
    rows = []
    for name, seeds in curves.items():
        found = Counter(curve.best or "not recorded" for curve in seeds.values())
        if any(curve.best for curve in seeds.values()):
            rows.append([label(name), "; ".join(f"{best} ({count})" for best, count in found.most_common())])
    if not rows:
        return []
    return ["### What they give in the end", "", *tables.table(("search", "candidate (seeds)"), rows), ""]


def commits_cell(seeds: Mapping[int, Curve]) -> str:
    """What code ran them, as far as that was recorded."""
    return ", ".join(dict.fromkeys(curve.commit for curve in seeds.values() if curve.commit)) or "–"


def seconds_cell(seeds: Mapping[int, Curve]) -> str:
    """The mean over seeds whose seconds were recorded."""
    known = [curve.seconds for curve in seeds.values() if not math.isnan(curve.seconds)]
    return f"{np.mean(known):,.0f}" if known else "–"


def reach_cells(seeds: Mapping[int, Curve], yardstick: Mapping[int, Curve]) -> tuple[str, str, str]:
    both = sorted(seeds.keys() & yardstick.keys())
    if not both:
        return "–", "–", "–"
    costs = {seed: seeds[seed].cost_of(yardstick[seed].at(math.inf)[0]) for seed in both}
    reached = [seed for seed in both if math.isfinite(costs[seed])]
    if not reached:
        return f"0 of {len(both)}", "–", "–"
    share = float(np.median([costs[seed] / yardstick[seed].documents for seed in reached]))
    cost = float(np.median([costs[seed] for seed in reached]))
    return f"{len(reached)} of {len(both)}", f"{cost:,.0f}", f"{share:.3f}"


def paired_table(curves: Curves, yardstick: str) -> list[str]:
    rows = []
    for name, seeds in curves.items():
        found = differences(seeds, curves[yardstick])
        if name == yardstick or not found:
            continue
        mean = Mean.of([difference for _, difference in found])
        spent = float(np.mean([documents for documents, _ in found]))
        better = sum(difference > 0 for _, difference in found)
        rows.append([label(name), f"{spent:,.0f}", *difference_cells(mean), f"{better} of {len(found)}"])
    titles = ("search", "documents", f"holdout score less that of {yardstick}", ERRORS, "seeds better")
    return tables.table(titles, rows)


def rivals(curves: Curves) -> list[str]:
    """What a user has of auto and would have had of each other search, whatever each of them cost."""
    whole = "auto"
    mine, rows = curves.get(whole, {}), []
    for name in (name for name in curves if name != whole and not name.startswith(ABLATION)):
        seeds = sorted(mine.keys() & curves[name].keys())
        found = [mine[seed].at(math.inf)[1] - curves[name][seed].at(math.inf)[1] for seed in seeds]
        if found:
            better, equal = sum(each > 0 for each in found), sum(each == 0 for each in found)
            rows.append([label(name), len(found), *difference_cells(Mean.of(found)), better, equal])
    if not rows:
        return []
    lines = [
        f"### {whole} beside each of the others, where both have ended",
        "",
        f"The holdout score of `{whole}` less that of the other with the same seed.",
        "",
    ]
    titles = ("search", "seeds", f"{whole} less it", ERRORS, "seeds better", "equal")
    return [*lines, *tables.table(titles, rows), ""]


def ablations(curves: Curves, of: str = "") -> list[str]:
    """What it costs to leave a part of auto out, or to change it.

    Args:
        of: how the names end of the version that is meant.
    """
    whole = f"auto{of}"
    changed = [n for n in curves if n.startswith(ABLATION) and n.endswith(EARLIER) == bool(of) and whole in curves]
    if not changed:
        return []
    lines = [
        f"### Each part of {whole} left out, or changed",
        "",
        f"Less the score of `{whole}` with the same seed, after as many document evaluations as the cheaper one",
        "spent.",
        "",
    ]
    titles = ("search", "seeds", f"search score less that of {whole}", ERRORS, "on the holdout", ERRORS)
    return [*lines, *tables.table(titles, difference_rows(curves, [(name, whole) for name in changed])), ""]


def since(curves: Curves) -> list[str]:
    """What each search has that version 0.1 had too."""
    both = [(name, f"{name}{EARLIER}") for name in curves if f"{name}{EARLIER}" in curves]
    rows = difference_rows(curves, both)
    if not rows:
        return []
    lines = [
        "### Since version 0.1",
        "",
        "Less the score of the same search as 0.1 ran it, with the same seed, after as many document evaluations as",
        "the cheaper one spent.",
        "",
    ]
    titles = ("search", "seeds", "search score less that of 0.1", ERRORS, "on the holdout", ERRORS)
    return [*lines, *tables.table(titles, rows), ""]


def difference_rows(curves: Curves, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """A row for each pair of searches that have seeds in common."""
    rows = []
    for name, other in pairs:
        sides = [[d for _, d in differences(curves[name], curves[other], side)] for side in (0, 1)]
        if sides[0]:
            cells = [cell for found in sides for cell in difference_cells(Mean.of(found))]
            rows.append([label(name), str(len(sides[0])), *cells])
    return rows


def difference_cells(mean: Mean) -> tuple[str, str]:
    """A mean difference, half its interval, and how many of its standard errors it is."""
    half = "" if math.isnan(mean.half) else f" ± {mean.half:.4f}"
    errors = f"{mean.value / mean.stderr:+.1f}" if mean.stderr > 0 else "–"
    return f"{mean.value:+.4f}{half}", errors


def differences(seeds: Mapping[int, Curve], others: Mapping[int, Curve], side: int = 1) -> list[tuple[int, float]]:
    """(document evaluations, how much better the holdout score is, or with `side` 0 the search score) seed by seed,
    where both have spent what the cheaper one spent in all."""
    found = []
    for seed in sorted(seeds.keys() & others.keys()):
        spent = min(seeds[seed].documents, others[seed].documents)
        found.append((spent, seeds[seed].at(spent)[side] - others[seed].at(spent)[side]))
    return found


def marks_table(curves: Curves) -> list[str]:
    """Scores after as many documents as 100, 200, 400 candidates take; on a small budget, after quarters of it."""
    each = max((curve.each for seeds in curves.values() for curve in seeds.values()), default=0)
    most = max((curve.documents for seeds in curves.values() for curve in seeds.values()), default=0)
    marks = [mark * each for mark in MARKS if mark * each <= most] or [most // 4, most // 2, most]
    heads = [f"{side} at {mark:,}" for mark in marks for side in ("search", "holdout")]
    rows = []
    for name, seeds in curves.items():
        cells = []
        for mark in marks:
            ends = [curve.at(mark) for curve in seeds.values()]
            cells += [str(Mean.of([end[side] for end in ends])) for side in (0, 1)]
        rows.append([label(name), *cells])
    return tables.table(["search", *heads], rows)


# --- the curves ---


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
    panels = {title: names for title, names in panels.items() if names}
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
    low, high = max(curve.points[0].documents for curve in started), max(curve.documents for curve in started)
    grid = np.unique(np.geomspace(low, max(high, low + 1), 200).round())
    mean, error = band(seeds, grid)
    words = f"{label(name)} ({len(started)} seed{'s' * (len(started) != 1)})"
    (line,) = axis.step(grid, mean, where="post", label=words, linestyle="--" if dashed else "-")
    axis.fill_between(grid, mean - error, mean + error, step="post", alpha=0.12, linewidth=0, color=line.get_color())
