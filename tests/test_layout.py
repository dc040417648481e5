"""The floors of ARCHITECTURE.md: imports go down and never in a circle, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mergesearch"
FLOORS = {
    "crashes": 0, "disks": 0, "errors": 0, "leftovers": 0, "memory": 0, "signals": 0,
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
# every library that is not light, with the rooms that import it; numpy and torch are everywhere
HOMES = {
    "accelerate": {"engine", "evaluate"},
    "cmaes": {"search"},
    "datasets": {"evaluate"},
    "filelock": {"engine", "search"},
    "gguf": {"engine"},
    "google": {"search"},
    "grpc": {"search"},
    "huggingface_hub": {"checkpoints", "engine"},
    "jinja2": {"evaluate", "results"},
    "llama_cpp": {"engine"},
    "lm_eval": {"evaluate"},
    "mlflow": {"results"},
    "optuna": {"search"},
    "optuna_dashboard": {"search"},
    "peft": {"checkpoints"},
    "torchao": {"engine"},
    "pandas": {"results"},
    "plotly": {"results"},
    "psutil": {"leftovers", "memory"},
    "pydantic": {"config", "recipe", "schema", "search"},
    "pydantic_core": {"config"},
    "ray": {"commands"},
    "rich": {"cli", "commands", "results"},
    "safetensors": {"checkpoints"},
    "scipy": {"search"},
    "sqlalchemy": {"search"},
    # search/soup and engine/streaming know its classes; models are read and built in checkpoints, and run in evaluate
    "transformers": {"checkpoints", "engine", "evaluate", "search"},
    "typer": {"cli"},
    "vllm": {"evaluate"},
    "wandb": {"results"},
    "yaml": {"checkpoints", "commands", "config", "evaluate", "mergekit", "recipe", "results", "schema"},
}
LIGHT = {"mergesearch", "numpy", "torch"}
# pairs of modules that are known to stand in a circle; none is welcome here
CIRCLES: set[frozenset[str]] = set()

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


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}


def _edges(modules: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others, at its head, in functions and for type checkers alike.

    A name that a package's `__init__` gathers is imported from the `__init__`, which counts as a module of its own; a
    module of the package is imported from itself. That Python loads the package before it is left out: else every
    package that gathers its modules' names would stand in a circle with them.
    """

    def known(name: str) -> set[str]:
        return {name, f"{name}.__init__"} & modules.keys()

    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges[name].update(*(known(alias.name) for alias in node.names))
            elif isinstance(node, ast.ImportFrom):
                package = node.module or ""
                edges[name].update(*(known(f"{package}.{alias.name}") or known(package) for alias in node.names))
        edges[name].discard(name)
    return edges


def _circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that reach one another: strongly connected, more than one."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in edges[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    reach = {name: reached(name) for name in edges}
    together = {name: frozenset(other for other in reach[name] if name in reach[other]) for name in edges}
    return {circle for circle in together.values() if circle}


def test_circles_are_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert _circles(edges) == {frozenset("abc")}
    assert _circles({**edges, "c": {"d"}}) == set()


def test_no_module_imports_in_a_circle() -> None:
    edges = _edges(_modules())
    assert "mergesearch.checkpoints.checkpoint" in edges["mergesearch.checkpoints.checks"]
    assert _circles(edges) == CIRCLES


def _libraries(path: Path) -> set[str]:
    return {imported.split(".")[0] for imported in _imports(path)} - sys.stdlib_module_names - LIGHT


def test_heavy_libraries_have_their_homes_and_no_others() -> None:
    rooms: dict[str, set[str]] = {}
    for path in MODULES:
        for library in _libraries(path):
            rooms.setdefault(library, set()).add(_name(path))
    assert rooms == HOMES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_below_the_command_prints(path: Path) -> None:
    if _name(path) == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = sorted({"torch", "numpy", *HOMES})
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


def test_a_class_name_means_one_thing() -> None:
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_one_module_knows_how_trials_are_kept() -> None:
    named = {str(path.relative_to(PACKAGE)) for path in MODULES if "user_attr" in path.read_text()}
    # the storage that waits passes on what it is given, whatever that is; the mirror's study is the dashboard's alone
    assert named == {"search/trials.py", "search/store.py", "search/storage.py", "search/mirror.py"}


def test_no_module_but_theirs_knows_strategies_by_name() -> None:
    from mergesearch.search.strategies import registered

    names = set(registered()) - {"baselines", "random", "study"}  # these are plain words too
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[:2] in (("search", "strategies"), ("search", "soup")):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & names, f"{path} names {strings & names}"
