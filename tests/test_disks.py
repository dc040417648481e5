"""What the disk under a path is, and how much room it has."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from mergesearch import disks
from mergesearch.checkpoints import new_folder, save
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    there = tmp_path / "not" / "yet"
    assert disks.free(there) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    disks.need(there, 1)
    with pytest.raises(
        OSError, match=r"No space left on device: 976562.5 GiB are to be written, .* GiB are free"
    ) as told:
        disks.need(there, 976_562 * 2**30 + 2**29)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(there)
    assert not there.exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("home/me/runs", "nfs4"),
        ("home/me", "nfs4"),
        ("home/mean", None),
        ("home/me/scratch/run", None),
        ("data/a b/run", "fuse.sshfs"),
        ("elsewhere", None),
    ],
)
def test_a_disk_that_others_write_too_is_known(tmp_path: Path, path: str, kind: str | None) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"overlay / overlay rw 0 0\nserver:/home {tmp_path}/home/me nfs4 rw 0 0\n"
        f"/dev/sda1 {tmp_path}/home/me/scratch ext4 rw 0 0\nme@host:/ {tmp_path}/data/a\\040b fuse.sshfs rw 0 0\nodd\n"
    )
    (tmp_path / path).mkdir(parents=True)
    assert disks.shared_kind(tmp_path / path / "study.db", mounts) == kind
    assert disks.shared_kind(tmp_path / path, tmp_path / "no such table") is None


def test_an_export_or_a_merge_without_room_is_refused_before_it_begins(
    tiny_pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Engine(tiny_pool().load(), "float32").model
    monkeypatch.setattr(disks, "free", lambda path: 1000)
    written: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", lambda *_, **__: written.append("file"))
    full = r"the disk is full \(0.0 GiB are to be written, 0.0 GiB are free\): free space"
    with pytest.raises(UserError, match=full), new_folder(tmp_path / "out") as folder:
        save(model, None, folder, {})
    assert written == [] and not (tmp_path / "out").exists()
