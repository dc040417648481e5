"""Pools of scripts/bench/search.py that are a line of YAML each, for tests in which searches end at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from scripts.bench import search, search_report
from scripts.bench.search_rows import Curve


def put_in_place(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    names: Collection[str],
    run: Callable[[search.Unit], Curve],
    judging: Collection[str] = (),
) -> dict[str, search.Pool]:
    """Such pools instead of the real ones, and what a search gives; what the page draws is left out.

    Args:
        names: of the pools; their files lie in the folder.
        run: any search.
        judging: those of the names that nothing may be chosen by.
    """
    known = {}
    for name in names:
        file = folder / f"{name}.yaml"
        file.write_text(f"name: {name}\nmodels: {{a: b}}\n")
        known[name] = search.Pool(file, 100, 100, judging=name in judging)
    monkeypatch.setattr(search, "POOLS", known)
    for kind in ("run_own", "run_yardstick"):
        monkeypatch.setattr(search, kind, run)
    monkeypatch.setattr(search_report, "draw", lambda *_: False)
    return known
