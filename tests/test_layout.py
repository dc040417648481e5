"""The floors of DESIGN.md: a module imports lower floors only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergesearch"
FLOORS = {
    "errors": 0,
    "schema": 1, "paths": 1, "zoo": 1, "methods": 1,
    "recipe": 2, "config": 2,
    "checkpoints": 3, "evaluate": 3, "space": 3,
    "mergekit": 4, "engine": 4,
    "search": 5,
    "results": 6,
    "commands": 7,
    "cli": 8,
}  # fmt: skip
HOMES = {"lm_eval": {"evaluate"}, "optuna": {"search", "space"}, "plotly": {"results"}, "typer": {"cli"}}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "tasks" not in path.parts)


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    mine = _name(path)
    if mine in ("__init__", "__main__"):
        return
    for imported in _imports(path):
        parts = imported.split(".")
        if parts[0] != "mergesearch" or len(parts) < 2 or parts[1] == mine or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] < FLOORS[mine], f"{mine} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_have_one_home(path: Path) -> None:
    for imported in _imports(path):
        homes = HOMES.get(imported.split(".")[0])
        assert homes is None or _name(path) in homes, f"{path} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_below_the_command_prints(path: Path) -> None:
    if _name(path) == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "lm_eval", "optuna", "plotly", "numpy")
    code = f"import sys, mergesearch; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import mergesearch

    for name in mergesearch.__all__:
        assert getattr(mergesearch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Recipy'"):
        _ = mergesearch.Recipy
