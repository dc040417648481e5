"""The floors of DESIGN.md: a module imports lower floors only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergesearch"
FLOORS = {
    "errors": 0, "memory": 0,
    "schema": 1, "paths": 1, "registry": 1, "zoo": 1, "methods": 1,
    "recipe": 2,
    "config": 3,
    "checkpoints": 4, "evaluate": 4, "space": 4,
    "mergekit": 5, "engine": 5,
    "search": 6,
    "results": 7,
    "commands": 8,
    "cli": 9,
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


# --- the page ---

ROOT = PACKAGE.parent


def _table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of ARCHITECTURE.md, without its head."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_page_names_the_floors() -> None:
    assert {room: int(floor) for floor, rooms, _ in _table("Rooms and floors") for room in _names(rooms)} == FLOORS


def test_the_page_names_the_rooms_of_heavy_libraries() -> None:
    named = {
        name: set(_names(rooms)) for names, rooms, _ in _table("Where heavy libraries live") for name in _names(names)
    }
    rooms: dict[str, set[str]] = {name: set() for name in named}
    for path in MODULES:
        for library in {imported.split(".")[0] for imported in _imports(path)} & rooms.keys():
            rooms[library].add(_name(path))
    assert named == rooms


def test_every_room_has_a_floor() -> None:
    assert {_name(path) for path in MODULES} - {"__init__", "__main__"} <= FLOORS.keys()


# --- tests and scripts ---

TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


def _is_test(name: str) -> bool:
    return any(part.startswith("test_") for part in name.split("."))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_import_no_tests(path: Path) -> None:
    """What they share lies in tests/support."""
    homes = {file.stem for file in TESTS if file.parent.name == "tests"} | {"tests"}
    assert not {name for name in _imports(path) if name.split(".")[0] in homes}
    assert not {name for name in _imports(path) if name.split(".")[0] == "support" and _is_test(name)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scripts_import_no_tests(path: Path) -> None:
    """What they share with tests lies in scripts/bench/shared; they are run as modules, so no path is bent."""
    tests = {file.stem for file in TESTS} | {"tests", "support"}
    assert not {name for name in _imports(path) if name.split(".")[0] in tests}
    attributes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    ]
    bent = [n.lineno for n in attributes if n.attr == "path" and isinstance(n.value, ast.Name) and n.value.id == "sys"]
    assert not bent


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_package_imports_neither_tests_nor_scripts(path: Path) -> None:
    assert not {name for name in _imports(path) if name.split(".")[0] in ("scripts", "tests", "support")}
