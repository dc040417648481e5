"""The package's types are whole for whoever checks code that uses it."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM

PACKAGE = Path(__file__).parent.parent / "mergesearch"


def _installed(folder: Path) -> Path:
    """The interpreter of an environment with a copy of the package, beside the libraries that are here."""
    venv.create(folder, with_pip=False)
    site = next(folder.rglob("site-packages"))
    shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    libraries = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_every_public_name_has_a_known_type(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    python = _installed(tmp_path / "environment")
    # a checkout on the path would stand before the copy
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # --verifytypes looks where the first `python` of PATH does, whatever --pythonpath says
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "pyright", "--verifytypes", PACKAGE.name, "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stdout, done.stderr
    seen = json.loads(done.stdout[done.stdout.index("{") :])["typeCompleteness"]
    assert str(seen["packageRootDirectory"]).startswith(str(tmp_path))
    assert len(seen["symbols"]) > 1000
    unknown = {
        symbol["name"]: [f"{fault['file']}: {fault['message']}" for fault in symbol["diagnostics"]]
        for symbol in seen["symbols"]
        if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    }
    assert unknown == {}
    assert seen["completenessScore"] == 1


def _declared() -> ast.ClassDef:
    """What evaluate/model.py tells type checkers of HFLM."""
    tree = ast.parse((PACKAGE / "evaluate" / "model.py").read_text(encoding="utf-8"))
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "_HFLM")


@pytest.mark.parametrize("method", [node for node in _declared().body if isinstance(node, ast.FunctionDef)],
                         ids=lambda node: node.name)  # fmt: skip
def test_lm_evals_model_has_the_methods_that_are_declared(method: ast.FunctionDef) -> None:
    there = inspect.getattr_static(HFLM, method.name)
    is_property = any(isinstance(node, ast.Name) and node.id == "property" for node in method.decorator_list)
    assert isinstance(there, property) == is_property
    if is_property:
        return
    theirs = inspect.signature(there).parameters
    arguments = method.args
    positional = [argument.arg for argument in arguments.args]
    assert positional == list(theirs)[: len(positional)]
    assert {argument.arg for argument in arguments.kwonlyargs} <= theirs.keys()
    assert (arguments.kwarg is None) or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in theirs.values())
    defaults = [ast.literal_eval(node) for node in arguments.defaults]
    assert defaults == [theirs[name].default for name in positional[len(positional) - len(defaults) :]]


def test_lm_evals_model_has_the_attributes_that_are_declared() -> None:
    source = inspect.getsource(HFLM)
    names = [n.target.id for n in _declared().body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    assert names
    assert [name for name in names if f"self.{name} = " not in source and f"self.{name}: " not in source] == []
