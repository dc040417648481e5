"""What killed processes were writing goes at the next start; what others are writing stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergesearch import leftovers
from mergesearch.checkpoints import new_folder
from mergesearch.search import store
from mergesearch.search.store import RunFolder


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def left_by(pid: int, path: Path) -> Path:
    return Path(str(leftovers.partial(path)).replace(f"partial-{os.getpid()}-", f"partial-{pid}-"))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_killed_merge_is_cleared_by_the_next_to_the_same_folder(dead: int, tmp_path: Path) -> None:
    for pid, name in ((dead, "out"), (dead, "other"), (os.getpid(), "out")):
        folder = left_by(pid, tmp_path / name)
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    (tmp_path / f".out.partial-{dead}").mkdir()  # of an earlier version
    elsewhere = Path(str(left_by(dead, tmp_path / "out")).replace(f"@{socket.gethostname()}", "@another-host"))
    elsewhere.mkdir()
    mine = tmp_path / f".out.{dead}"
    mine.write_text("the user's own")
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("whole")
    kept = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".out.partial-")]
    assert elsewhere in kept and len(kept) == 2 and mine.is_file()  # beside it what this living process is writing
    assert any(name.startswith(f".other.partial-{dead}-") for name in names(tmp_path))
    assert names(tmp_path / "out") == ["x"]


def test_a_run_folder_is_cleared_at_the_next_start(dead: int, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.scores.mkdir()
    run.fresh.mkdir()
    whole = [tmp_path / "config.yaml", run.scores / "00003.npz"]
    for path in (*whole, run.fresh / "new", tmp_path / "documents.json"):
        left_by(dead, path).write_text("half")
    for old in (f".config.yaml.{dead}", f".config.yaml.{dead}-0123abcd", f".best.partial-{dead}"):
        (tmp_path / old).write_text("half")
    for path in whole:
        path.write_text("whole")
    run.clear()
    assert names(tmp_path) == [".best", "config.yaml", "scores"]
    assert names(run.scores) == ["00003.npz"] and names(run.fresh) == []


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    path = leftovers.partial(tmp_path / "config.yaml")
    path.write_text("half")
    leftovers.clear(tmp_path)
    assert path.exists()


def test_another_process_that_has_the_number_by_now_is_not_the_writer(tmp_path: Path) -> None:
    path = leftovers.partial(tmp_path / "config.yaml")
    path.write_text("half")
    day = time.time() - 86400 * 365
    os.utime(path, (day, day))  # long before this process began
    leftovers.clear(tmp_path)
    assert not path.exists()


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_atomically(tmp_path / "config.yaml", "text")
    assert names(tmp_path) == []


def test_the_longest_name_has_a_place_to_be_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / ("ä" * 127)) as folder:
        (folder / "x").write_text("whole")
    assert names(tmp_path) == ["ä" * 127]
