"""Print results/reliability.md: what came of the faults, inputs and damaged files that tests/faults tries.

    MERGESEARCH_FAULTS_RECORD=outcomes.jsonl python -m pytest -m chaos tests/faults
    python -m scripts.bench.reliability outcomes.jsonl > results/reliability.md

The first command takes the time that the page says, on two cores; it notes one outcome a line, the second counts them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scripts.bench.engine import machine
from scripts.bench.shared import tables
from scripts.bench.shared.notes import notes_of

PAGE = Path(__file__).parents[2] / "results" / "reliability.md"

PARTS = {
    "calls": "Calls that fail",
    "limits": "Limits of the system",
    "inputs": "Wrong inputs",
    "files": "Damaged files",
}
ABOUT = {
    "calls": "Each call of a small run, a race with learned soups, a merge, an export, a report and a table is made to "
    "fail: files and folders (opened, written, renamed, removed, listed, locked, read), the storage's statements and "
    "commits, the model's forward passes and merges. Asked of each: a status of 0, 1, 2 or 130; one sentence and no "
    "exception's name; no partial file, after a kill none once it is started again; and the same command again ends as "
    "an undisturbed one, trial for trial, document for document, byte for byte of the winner.",
    "limits": "A run and a merge with less memory, fewer open files or smaller files than they need, set by the "
    "operating system; and a model's file that is cut while it is merged. Asked of each: as above.",
    "inputs": "Valid files with one mutation or two: a key dropped, renamed, doubled or added, a value of another "
    "type, out of range, too long, or a text that is cut, in another encoding, nested 3,000 levels deep, and so on. "
    "Asked of each: status 0 or 2, one sentence, nothing written on 2; what `check` refuses, no other verb accepts.",
    "files": "A model's files are damaged and merged; the files of a finished run are damaged and met by `table`, "
    "`report`, `export` and `run`. Asked of each: one sentence, nothing half written, nothing read outside a model's "
    "folder; and a run that ends with 0 holds what it held before the damage.",
}


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", type=Path, nargs="+", help="what runs of the harness noted")
    lines = [json.loads(line) for file in parser.parse_args().outcomes for line in file.read_text().splitlines()]
    outcomes = [line for line in lines if "case" in line]
    runs = [line for line in lines if "versions" in line]
    print("\n".join(page(outcomes, runs)))


def page(outcomes: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    """The page's lines.

    Args:
        outcomes: one for each case, as `faults.cases.Outcome` has them.
        runs: of each run of the harness its versions, date and seconds.
    """
    failed = [outcome for outcome in outcomes if outcome["wrong"]]
    versions = ", ".join(f"{name} {version}" for name, version in runs[-1]["versions"].items() if name != "device")
    minutes = sum(run["seconds"] for run in runs) / 60
    yield "# What was broken on purpose, and what came of it\n"
    yield "    MERGESEARCH_FAULTS_RECORD=outcomes.jsonl python -m pytest -m chaos tests/faults"
    yield "    python -m scripts.bench.reliability outcomes.jsonl > results/reliability.md\n"
    yield f"{runs[-1]['date']}; {minutes:.0f} minutes on {machine()}; {versions}.\n"
    yield (
        f"{len(outcomes):,} cases: {len(outcomes) - len(failed):,} ended as they should, {len(failed):,} did not. "
        "The harness fails on a failure that is not listed here with its reason, and on a listed one that is mended."
    )
    for part, title in PARTS.items():
        mine = [outcome for outcome in outcomes if outcome["part"] == part]
        yield f"\n## {title}\n\n{ABOUT[part]}\n"
        kinds = sorted({outcome["kind"] for outcome in mine})
        rows = [_row(kind, [outcome for outcome in mine if outcome["kind"] == kind]) for kind in kinds]
        titles = ("what was done", "cases", "as it should", "not", "statuses")
        yield from tables.table(titles, [*rows, _row("**all**", mine)])
    yield "\n## What remains\n"
    yield from _remaining(failed)
    yield from notes_of(PAGE)


def _row(kind: str, outcomes: Sequence[dict[str, Any]]) -> tuple[str, int, int, int, str]:
    bad = sum(bool(outcome["wrong"]) for outcome in outcomes)
    statuses = Counter(str(outcome["status"]) for outcome in outcomes)
    words = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
    return kind, len(outcomes), len(outcomes) - bad, bad, words


def _remaining(failed: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not failed:
        yield "Nothing that is known."
        return
    rows = []
    for reason, count in Counter(outcome["reason"] for outcome in failed).most_common():
        example = next(outcome for outcome in failed if outcome["reason"] == reason)
        name = example["case"].replace("|", "\\|").replace("`", "'")
        rows.append([count, f"`{name[:100]}`", reason or "not looked into"])
    yield from tables.table(("cases", "for example", "why it remains"), rows)


if __name__ == "__main__":
    main()
