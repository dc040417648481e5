"""What a long search takes and goes on taking: memory, and the time for a proposal: prints results/soak.md.

    python -m scripts.bench.soak --trials 2000 --out results/soak.md

A search over the demo zoo, the smallest models that there are, with the default sampler and few documents, in one
process. The time for a proposal is that from one trial's end to the next one's beginning: the study read, the sampler
asked, the turn waited for. Memory is the process's resident set, its median over a window of trials, as is the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from mergesearch.commands.run import prepare
from mergesearch.config import Config
from mergesearch.schema import validate
from mergesearch.search.machine import machine
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

FORMATS = {"trials": "{}", "resident memory": "{:.0f} MiB", "a proposal takes": "{:.3f} s"}
WINDOW = 50
MOST_MEMORY, MOST_TIME = 0.02, 3.0
FIRST = 200


@dataclass(frozen=True)
class Look:
    """One trial: resident bytes at its end, seconds from the end of the one before to its beginning."""

    trial: int
    memory: int
    proposal: float


def settings(folder: Path, trials: int, documents: int) -> Config:
    data: dict[str, Any] = {
        "name": "soak",
        "base_model": "zoo:base",
        "models": {"order": "zoo:order", "letters": "zoo:letters"},
        "tasks": [{"task": "zoo_letters", "metric": "acc", "limit": documents}],
        "space": {"methods": ["task_arithmetic", "ties", "dare_ties"], "weight": [0.0, 1.5]},
        "search": {"strategy": "study", "trials": trials, "defaults": False, "seed": 0},
        "dtype": "float32",
        "device": "cpu",
        "output": str(folder),
    }
    return validate(Config, data, "soak")


def soak(config: Config, told: Any = print) -> list[Look]:
    """Every trial of a search, in the order in which they ended."""
    process, looks = psutil.Process(), []
    moments = {"ended": time.perf_counter(), "proposal": 0.0}

    def started(record: Any) -> None:
        moments["proposal"] = time.perf_counter() - moments["ended"]

    def finished(record: Any) -> None:
        moments["ended"] = time.perf_counter()
        looks.append(Look(record.number, process.memory_info().rss, moments["proposal"]))
        if len(looks) % WINDOW == 0:
            told(f"{len(looks)} trials: {looks[-1].memory / 2**20:.0f} MiB, {looks[-1].proposal:.3f} s a proposal")

    session = prepare(config, started=started, finished=finished)
    session.search.run()
    return looks


def around(looks: list[Look], place: int) -> tuple[float, float]:
    """(MiB, seconds of a proposal), the medians of a window that ends at a trial."""
    window = looks[max(0, place - WINDOW) : place]
    return (
        statistics.median(look.memory for look in window) / 2**20,
        statistics.median(look.proposal for look in window),
    )


def page(looks: list[Look], documents: int, notes: list[str]) -> list[str]:
    trials = len(looks)
    places = [place for place in (WINDOW, FIRST, 500, 1000, 1500, 2000) if place < trials]
    places = sorted({*places, trials})
    first = min(FIRST, places[0] if trials <= FIRST else FIRST)
    (memory, seconds), (last_memory, last_seconds) = around(looks, first), around(looks, trials)
    growth, slower = last_memory / memory - 1, last_seconds / seconds
    versions = ", ".join(
        f"{key} {value}" for key, value in machine("cpu").items() if key in ("python", "torch", "optuna")
    )
    kept = "kept" if growth < MOST_MEMORY and slower <= MOST_TIME else "missed"
    return [
        "# A long search: memory, and the time for a proposal", "",
        f"`python -m scripts.bench.soak --trials {trials}`; {date.today()}; {documents} documents a candidate; "
        f"{versions}.",
        "", f"Medians over {WINDOW} trials that end there.", "",
        *tables.table(FORMATS, [(place, *around(looks, place)) for place in places], FORMATS), "",
        f"From trial {first} to {trials} memory grew by {growth:.1%} (asked: below {MOST_MEMORY:.0%}), the time for a "
        f"proposal to {slower:.1f} times (asked: at most {MOST_TIME:.0f}): {kept}.", *notes, "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/soak.md"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mergesearch-soak-") as folder:
        looks = soak(settings(Path(folder) / "run", given.trials, given.documents))
    lines = page(looks, given.documents, notes_of(given.out))
    given.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
