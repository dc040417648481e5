"""What racing saves and what it costs, over recorded scores: prints results/racing.md.

    mergesearch run configs/quickstart.yaml          # without racing: every document of every trial
    python scripts/record_matrix.py results/quickstart tests/data/raced.npz
    python scripts/bench_racing.py

Every simulated search takes the baselines first and the recorded proposals in a random order, with blocks of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from raced import Matrix, Raced, race_all  # noqa: E402

from mergesearch.evaluate import statistics  # noqa: E402

SETTINGS = [(8, 0.01), (16, 0.01), (32, 0.01), (16, 0.05), (16, 0.2), (16, 0.5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, nargs="?", default=ROOT / "tests" / "data" / "raced.npz")
    parser.add_argument("--searches", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/racing.md"))
    arguments = parser.parse_args()
    matrix = Matrix.read(arguments.matrix)
    lines = head(matrix, arguments.searches)
    for blocks, error in SETTINGS:
        found = [race_all(matrix, blocks, error, seed) for seed in range(arguments.searches)]
        lines.append(_line(matrix, blocks, error, found))
        print(lines[-1], file=sys.stderr, flush=True)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(matrix: Matrix, searches: int) -> list[str]:
    """All but the rows."""
    sizes = ", ".join(f"{size} of {task}" for task, size in matrix.sizes().items())
    low, middle, high = np.quantile(distances(matrix), [0.25, 0.5, 0.75])
    return [
        "# Racing over recorded scores",
        "",
        f"`python scripts/bench_racing.py`: {searches} simulated searches a row over "
        f"{matrix.trials - matrix.baselines} recorded proposals after {matrix.baselines} baselines;",
        f"documents: {sizes}. *Saving*: document evaluations without racing / with it,",
        "for the whole search and for the proposals alone (baselines are never stopped). *Wrongly stopped*: of those",
        "that were stopped, the ones whose full score would have made them the best; *of contenders*: the same, of all",
        "whose full score makes them the best.",
        "",
        f"How much there is to save: on all documents the proposals lie {low:.1f}, {middle:.1f} and {high:.1f}",
        "standard errors of the paired difference (quartiles) behind the best one. What lies within two or so cannot",
        "be told from the best before nearly all documents are scored.",
        "",
        "| blocks | error | saving | saving on proposals | stopped | wrongly stopped | of contenders | same winner |",
        "|---|---|---|---|---|---|---|---|",
    ]


def distances(matrix: Matrix) -> list[float]:
    """Of each proposal from the best one, in standard errors of their paired difference on all documents."""
    proposals = range(matrix.baselines, matrix.trials)
    best = max(proposals, key=matrix.objective)
    found = []
    for trial in proposals:
        parts = [
            factor * (statistics.difference(values[best], values[trial], matrix.aggregations[task]).stderr or 0.0)
            for task, factor in matrix.factors.items()
            for values in [matrix.values[task]]
        ]
        stderr = math.sqrt(sum(part**2 for part in parts))
        if trial != best and stderr:
            found.append((matrix.objective(best) - matrix.objective(trial)) / stderr)
    return found


def _line(matrix: Matrix, blocks: int, error: float, found: list[Raced]) -> str:
    full, spent = sum(r.full for r in found), sum(r.evaluations for r in found)
    fixed = len(found) * matrix.baselines * sum(matrix.sizes().values())
    stopped, wrong, contenders = (sum(getattr(r, name) for r in found) for name in ("stopped", "wrong", "contenders"))
    proposals = len(found) * (matrix.trials - matrix.baselines)
    return (
        f"| {blocks} | {error:g} | {full / spent:.2f} | {(full - fixed) / (spent - fixed):.2f} "
        f"| {stopped / proposals:.1%} | {wrong / max(1, stopped):.2%} | {wrong / max(1, contenders):.2%} "
        f"| {sum(r.same_winner for r in found) / len(found):.1%} |"
    )


if __name__ == "__main__":
    main()
