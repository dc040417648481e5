"""Where a checkpoint may be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergesearch.checkpoints import check_new_folder
from mergesearch.errors import UserError


def test_a_usable_folder_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "a" / "b" / "new", tmp_path / "empty", Path("relative"), Path("r/s")):
        check_new_folder(out)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already: name a new folder"):
            check_new_folder(out)
    with pytest.raises(UserError, match=r"cannot write .*file is a file"):
        check_new_folder(tmp_path / "file" / "out")


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="is not writable"):
        check_new_folder(tmp_path / "a" / "out")
