"""The notebook in docs/examples runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "examples" / "search.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # the kernel is a process of its own, in another folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = [str(cell.outputs) for cell in cells]
    assert "0 base" in said[1] and "average" in said[1]
    assert "zoo_both" in said[2] and "text/html" in said[2]
    assert "on the documents" in said[3] or "holdout" in said[3]
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "page.html").is_file()


def test_the_notebook_is_kept_as_it_is_typed() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    # a script of some twenty lines
    assert sum(len(cell.source.splitlines()) for cell in code) <= 25
