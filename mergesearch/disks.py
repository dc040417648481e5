"""What the disk under a path is, and how much room it has."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

# kinds of file systems that other hosts may write as well, as /proc/mounts names them
_SHARED = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "9p",
    "afs",
    "wekafs",
    "pvfs",
    "panfs",
)
_MOUNTS = Path("/proc/mounts")


def free(path: Path) -> int:
    """The bytes that may still be written under a path, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def need(path: Path, size: int) -> None:
    """Looks whether so many bytes have room under a path, before any of them is written.

    Raises:
        OSError: they have not, as the system would say in the middle of it.
    """
    left = free(path)
    if size > left:
        words = f"{size / 2**30:.1f} GiB are to be written, {left / 2**30:.1f} GiB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {words}", str(path))


def shared_kind(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The kind of the file system under a path where it is one that other hosts may write too (`nfs4`); None where it
    is none that is known as such.

    Args:
        path: need not exist yet.
        mounts: the system's table; without one nothing is known.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    place, found, longest = str(existing(path).resolve()), "", -1
    for line in lines:
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        top = parts[1].replace("\\040", " ").rstrip("/")
        if (place == top or place.startswith(f"{top}/")) and len(top) >= longest:
            found, longest = parts[2], len(top)
    plain = found.removeprefix("fuse.")
    return found if plain.startswith((*_SHARED, "sshfs", "juicefs")) else None


def existing(path: Path) -> Path:
    """The nearest folder that is there of those that a path leads through, or what is at the path itself."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
