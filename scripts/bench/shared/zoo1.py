"""The demo zoo of version 0.1, in tests/data/zoo1: tests and results/ stay about it, whatever zoo the package has."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "tests" / "data" / "zoo1"
TASKS = FOLDER / "tasks"
# ready configurations: a small search, which tests make smaller, and the one of results/search.md
QUICKSTART = FOLDER / "quickstart.yaml"
SEARCH = FOLDER / "search.yaml"

BASE = str(FOLDER / "models" / "base")
MODELS = {name: str(FOLDER / "models" / name) for name in ("code", "prose", "names", "strings")}
METRICS = {"zoo_code": "acc", "zoo_prose": "bits_per_byte", "zoo_names": "acc", "zoo_strings": "exact_match"}
