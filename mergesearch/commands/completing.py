"""The names that a shell completes, read from files: asking the registries would load torch at every press of a key."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergesearch import zoo

_PACKAGE = Path(__file__).resolve().parent.parent


def methods() -> list[str]:
    """The names of the merge methods, in alphabetical order."""
    functions = (node for node in _statements(_PACKAGE / "methods") if isinstance(node, ast.FunctionDef))
    return sorted(f.name for f in functions if any(_called(d) == "method" for d in f.decorator_list))


def strategies() -> list[str]:
    """The names of the strategies, in alphabetical order."""
    classes = (node for node in _statements(_PACKAGE / "search" / "strategies") if isinstance(node, ast.ClassDef))
    registered = (c for c in classes if any(_called(d) == "register" for d in c.decorator_list))
    return sorted(name for strategy in registered for name in _texts(strategy.body, "name"))


def models() -> list[str]:
    """The demo zoo's models, as references."""
    return [f"zoo:{name}" for name in zoo.names()]


def _statements(folder: Path) -> Iterator[ast.stmt]:
    for path in sorted(folder.glob("*.py")):
        yield from ast.parse(path.read_text(encoding="utf-8")).body


def _called(decorator: ast.expr) -> str | None:
    named = decorator.func if isinstance(decorator, ast.Call) else decorator
    return named.id if isinstance(named, ast.Name) else None


def _texts(body: Iterable[ast.stmt], name: str) -> Iterator[str]:
    """The texts that a class's body gives to a name."""
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        given = getattr(statement, "value", None)
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if isinstance(given, ast.Constant) and isinstance(given.value, str):
            yield from (given.value for target in targets if isinstance(target, ast.Name) and target.id == name)
