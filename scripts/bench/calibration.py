"""How often the report on the holdout is right, over simulated searches: prints results/calibration.md.

    python -m scripts.bench.calibration --searches 1000

Every search proposes 40 candidates beside a base, four models and their average, chooses on 200 search documents and is
reported on by the very code of `mergesearch report`, on documents that it did not see.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from mergesearch.results.report import Report
from scripts.bench.shared import tables
from scripts.bench.shared.simulated import World, claims_any, simulate

EQUAL = [World(n, differ) for n, differ in ((50, 0.08), (200, 0.08), (200, 0.3), (1000, 0.02), (1000, 0.08))]
GAIN = [World(1000, differ, gain=0.03) for differ in (0.04, 0.06, 0.08, 0.1, 0.15, 0.2)]


FORMATS = {
    "holdout documents": "{}",
    "differ": "{:.0%}",
    "true gain": "{:.0%}",
    "claims an improvement over any reference": "{:.1%}",
    "over both": "{:.1%}",
    "coverage": "{:.1%}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("results/calibration.md"))
    arguments = parser.parse_args()
    lines = [
        "# How often the report on the holdout is right",
        "",
        f"`python -m scripts.bench.calibration`: {arguments.searches:,} simulated searches a row, {arguments.draws} "
        "draws each. *differ* is the share of",
        "documents on which two equal candidates differ; *coverage* counts the 95 % intervals of the winner's "
        "differences that hold the true gain.",
        "",
    ]
    rows = []
    for world in [*EQUAL, *GAIN]:
        found = [simulate(world, seed, arguments.draws) for seed in range(arguments.searches)]
        rows.append(_row(world, found))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    lines += tables.table(FORMATS, rows, FORMATS)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(world: World, found: list[Report]) -> list[float]:
    """Under `FORMATS`."""
    claimed = np.mean([claims_any(report) for report in found])
    both = np.mean([report.improvement for report in found])
    return [world.documents, world.differ, world.gain, claimed, both, np.mean(list(_covered(world, found)))]


def _covered(world: World, found: list[Report]):
    for report in found:
        for row in report.sections[0].rows:
            if row.candidate == report.winner and report.winner.startswith("trial"):
                yield from (c.difference.low <= world.gain <= c.difference.high for c in row.compared)


if __name__ == "__main__":
    main()
