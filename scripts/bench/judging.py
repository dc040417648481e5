"""How often the judging pools were looked at: results/judging.md, to which scripts/bench/search.py appends a row for
each pool whenever it is about to run searches on it, before any of them begins."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from scripts.bench.search_rows import Key

ROOT = Path(__file__).resolve().parents[2]
# one file, whatever --out and --results say: a look is a look
FILE = ROOT / "results" / "judging.md"
HEAD = """\
# How often the judging pools were looked at

Pools that scripts/make_judging_pools.py makes, and that nothing was chosen by. scripts/bench/search.py appends a row
for each of them whenever it begins or goes on with searches there; so what was cut short counts again. A commit with a
+ had changes beside it. No setting was compared here; `auto` did change between looks, by the development pools, and
seeds that were looked at before it changed are not in the results.

| date | commit | pool | searches | seeds |
|---|---|---|---|---|
"""


def note(keys: Sequence[Key], ran_by: str) -> None:
    """Appends what is about to run, a row for each pool.

    Args:
        ran_by: the commit of the code that runs it.
    """
    if not keys:
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(FILE.with_name(f".{FILE.name}.lock")):
        text = FILE.read_text(encoding="utf-8") if FILE.is_file() else HEAD
        for pool in dict.fromkeys(key.pool for key in keys):
            ours = [key for key in keys if key.pool == pool]
            searches = ", ".join(dict.fromkeys(key.search for key in ours))
            seeds = " ".join(str(seed) for seed in sorted({key.seed for key in ours}))
            text += f"| {datetime.now(UTC):%Y-%m-%d %H:%M} | {ran_by} | {pool} | {searches} | {seeds} |\n"
        part = FILE.with_name(f".{FILE.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(FILE)


def looks() -> Counter[str]:
    """Pool -> the rows about it."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.is_file() else []
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    return Counter(cells[2] for cells in rows if len(cells) == 5 and cells[2] != "pool")


def commit() -> str:
    """Of this repository, with a + where files differ from it; "unknown" outside git."""
    try:
        short, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return short + ("+" if changes else "")
