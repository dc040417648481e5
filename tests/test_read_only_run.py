"""A run folder that may only be read, or that is damaged in places: what can be read is shown."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.searches import INFOS, Engine, Scorer, settings
from support.tiny_models import make_pool

from mergesearch.commands.export import export_trial
from mergesearch.commands.table import show, write_table
from mergesearch.errors import UserError
from mergesearch.results.loading import load_run
from mergesearch.search.store import DOCUMENTS, RunFolder, write_documents
from mergesearch.search.worker import Search
from mergesearch.space import SearchSpace

TRIALS = 3
NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that others may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def finished(path: Path, **changes: Any) -> RunFolder:
    config = settings(path, search={"trials": TRIALS}, dtype="float32", **changes)
    scorer = Scorer(Engine())
    folder = RunFolder.prepare(config)
    Search(config, folder, SearchSpace(config, INFOS, 2), scorer.engine, scorer).run()
    write_documents(folder, {"search": {"quiz": [0, 1]}, "holdout": {"quiz": [2]}})
    return folder


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:  # who may write everything
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="rights are another matter there")
@pytest.mark.parametrize("killed", [False, True])
def test_it_is_tabled_and_exported_elsewhere(killed: bool, place: Path) -> None:
    """Of one whose last worker was killed, the last trials are in the log beside the database."""
    pool = make_pool(place / "pool")
    for path in place.rglob("*.safetensors"):
        path.chmod(0o644)
    folder = finished(place / "run", base_model=pool.base, models=pool.models)
    if killed:
        shutil.copytree(folder.path, place / "copy")
        with contextlib.closing(sqlite3.connect(folder.database)) as reader:  # keeps the log from being emptied
            reader.execute("PRAGMA journal_mode=WAL")
            reader.execute("SELECT count(*) FROM trials").fetchone()
            with contextlib.closing(sqlite3.connect(folder.database)) as writer:
                writer.execute("PRAGMA wal_autocheckpoint=0")
                writer.execute("UPDATE trial_user_attributes SET value_json = value_json")
                writer.commit()
                shutil.rmtree(place / "copy")
                shutil.copytree(folder.path, place / "copy")
        assert (place / "copy" / "study.db-wal").stat().st_size
        folder = RunFolder(place / "copy")
    expected, before = str(show(load_run(finished_copy(folder, place)))[0]), sorted(folder.path.rglob("*"))
    out = place / "out"
    out.mkdir()
    out.chmod(0o777)
    with read_only(folder.path):
        run = load_run(folder.path)
        assert str(show(run)[0]) == expected and run.best() is not None
        write_table(folder.path, out / "table.csv", "csv")
        average = next(record.number for record in run.records if record.name == "average")
        export_trial(folder.path, out / "exported", str(average))
        assert (out / "exported" / "model.safetensors").is_file()
    assert sorted(folder.path.rglob("*")) == before


def finished_copy(folder: RunFolder, place: Path) -> Path:
    shutil.copytree(folder.path, place / "writable")
    return place / "writable"


@pytest.mark.parametrize(
    "damage", ['{"search": {"quiz": [0,', "[]", '{"search": 3}', "", '{"holdout": {}}', "9" * 5000]
)
def test_half_a_documents_file_is_a_sentence(damage: str, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    assert folder.search_documents() == {"quiz": [0, 1]}
    (folder.path / DOCUMENTS).write_text(damage)
    with pytest.raises(
        UserError, match=r"documents.json does not say which .* \(it is damaged\): start `mergesearch run"
    ):
        folder.search_documents()
    (folder.path / DOCUMENTS).unlink()
    with pytest.raises(UserError, match=r"\(No such file or directory\): start `mergesearch run` again"):
        folder.holdout_documents()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04" + bytes(200), b"not a zip"])
def test_damaged_scores_of_documents_leave_the_table(damage: bytes, tmp_path: Path) -> None:
    """It lacks the error of the difference to the best single model, which is what the documents are for."""
    folder = finished(tmp_path / "run")
    for file in folder.scores.glob("*.npz"):
        file.write_bytes(damage)
    table = str(show(load_run(folder.path))[0])
    assert "average" in table
