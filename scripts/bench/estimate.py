"""How good the estimate of the time left is, replayed on finished runs: prints results/estimate.md.

    mergesearch run configs/quickstart.yaml --set dtype=float32 --set search.seed=1 --set output=results/quickstart-1
    python -m scripts.bench.estimate results/quickstart-1 ...

The estimate is a pure function of the configuration, the trials so far and what was tried before the first one. So a
finished run, never interrupted, is cut off where so many of its trials had been scored, and what was estimated there is
compared with what the rest took: from that moment until its last trial was scored. Loading, and writing the winner, are
no part of either.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mergesearch.results.loading import load_run
from mergesearch.search.estimate import estimate
from mergesearch.search.history import History, settled_at
from mergesearch.search.store import open_run
from mergesearch.search.worker import machine
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

AFTER = (1, 3, 5)  # trials; and half of them
WITHIN = 1.5
MOMENTS = (*(f"after {count}" for count in AFTER), "after half")


@dataclass(frozen=True)
class Replayed:
    """What was estimated at one moment of a run, and what it took.

    Attributes:
        trials: how many had been scored.
        estimated, taken: seconds until the last one.
    """

    trials: int
    estimated: float
    taken: float

    @property
    def ratio(self) -> float:
        """Estimated over taken; above 1 where it took less."""
        return self.estimated / max(self.taken, 1e-9)

    @property
    def factor(self) -> float:
        """How far off it was, either way: at least 1."""
        return max(self.ratio, 1 / max(self.ratio, 1e-9))


def replay(history: History, after: Sequence[int]) -> list[Replayed]:
    """The estimates of a finished run after so many of its trials; those that it has not got are left out."""
    moments = sorted(moment for trial in history.trials if (moment := settled_at(trial)) is not None)
    found = []
    for count in after:
        if not 0 < count < len(moments):
            continue
        moment = moments[count - 1]
        rest = estimate(history.config, history.at(moment), now=moment)
        if rest is not None and rest.searching is not None:
            found.append(Replayed(count, rest.searching, (moments[-1] - moment).total_seconds()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--machine", default="CPU, 2 cores", help="where they ran, in words")
    parser.add_argument("--out", type=Path, default=Path("results/estimate.md"))
    arguments = parser.parse_args()
    rows = {run: _of(run) for run in arguments.runs}
    versions = ", ".join(f"{name} {version}" for name, version in _machine(arguments.runs[0]).items())
    names = " ".join(str(run) for run in arguments.runs)
    lines = [
        "# The estimate of the time left",
        "",
        f"`python -m scripts.bench.estimate {names}`; {date.today()}; {arguments.machine}; {versions}.",
        "",
        "What was estimated after so many trials / what the rest took, in seconds, and the ratio of the two. Loading",
        "and writing the winner are no part of either.",
        "",
        *tables.table(
            ("run", "trials", *MOMENTS), [[run.name, trials, *_cells(found)] for run, (trials, found) in rows.items()]
        ),
        "",
        *_summary([found for _, found in rows.values()]),
        *notes_of(arguments.out),
        "",
    ]
    text = "\n".join(lines)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


def _of(run: Path) -> tuple[int, list[Replayed | None]]:
    config, study = open_run(run)
    history = History(study, config)
    rest = estimate(config, history)
    if rest is None or rest.parts:
        raise SystemExit(
            f"{run} is not finished: go on with `mergesearch run`, and give runs that were not interrupted"
        )
    scored = sum(settled_at(trial) is not None for trial in history.trials)
    return scored, [next(iter(replay(history, [count])), None) for count in (*AFTER, scored // 2)]


def _machine(run: Path) -> dict[str, str]:
    """What the trials were scored with; without a device where that is the CPU, which `--machine` describes."""
    noted = next((record.machine for record in load_run(run).records if record.machine), None) or machine("cpu")
    return {name: version for name, version in noted.items() if (name, version) != ("device", "cpu")}


def _cells(found: Sequence[Replayed | None]) -> list[str]:
    return ["-" if each is None else f"{each.estimated:.0f} / {each.taken:.0f}: {each.ratio:.2f}" for each in found]


def _summary(rows: Sequence[Sequence[Replayed | None]]) -> list[str]:
    """The median and the worst factor over the runs, for each moment."""
    lines = []
    columns = [[each.factor for each in column if each is not None] for column in zip(*rows, strict=True)]
    for name, of in (("median", statistics.median), ("worst", max)):
        lines.append([name, *(f"{of(column):.2f}" if column else "-" for column in columns)])
    within = [f"{sum(factor <= WITHIN for factor in column)} of {len(column)}" for column in columns]
    return tables.table(("factor over the runs", *MOMENTS), [*lines, [f"within {WITHIN}", *within]])


if __name__ == "__main__":
    main()
