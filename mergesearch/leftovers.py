"""What is being written, under a name that says by whom, so that what a killed process left is told and cleared."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

# `.NAME.partial-PID-RANDOM@HOST`; earlier versions left out what stands after the PID
_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<pid>\d+)(-[0-9a-f]{8}@(?P<host>.+))?", re.DOTALL)
# what earlier versions called files of a run folder that were not complete
_FILE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-[0-9a-f]{8})?", re.DOTALL)
# seconds by which clocks may differ, of this machine and of the file system
_APART = 60.0
# bytes of a file's name, on every common file system
_LONGEST = 255
# what could not be taken away yet
_undone: list[Path] = []


def partial(path: Path) -> Path:
    """Where this process writes what takes the name `path` when it is complete; no other call gives the same."""
    owner = f".partial-{os.getpid()}-{uuid.uuid4().hex[:8]}@{socket.gethostname()}"
    # a long name is cut short, since only its owner tells what it is then
    name = path.name.encode()[: _LONGEST - 1 - len(owner.encode())].decode(errors="ignore")
    return path.with_name(f".{name}{owner}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Where to write what takes the name `path` at the end: a reader sees the old file or the new one, whole."""
    temporary = partial(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def clear(folder: Path, name: str | None = None) -> None:
    """Takes away what processes of this machine that are no more were writing in a folder.

    Args:
        folder: nothing happens where there is none, and what cannot be removed stays.
        name: only what was to become that; None for everything, in a folder that is this package's own.
    """
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            found = _PARTIAL.fullmatch(entry.name) or (_FILE.fullmatch(entry.name) if name is None else None)
            if found is None or name not in (None, found["name"]):
                continue
            if found.groupdict().get("host") in (None, socket.gethostname()) and _is_gone(int(found["pid"]), entry):
                _remove(entry)


def _is_gone(pid: int, entry: Path) -> bool:
    """Whether a process has ended; another one may have its number, and began later than the entry was written."""
    import psutil

    try:
        return psutil.Process(pid).create_time() > entry.lstat().st_mtime + _APART
    except (psutil.NoSuchProcess, OverflowError):
        return True
    except (psutil.Error, OSError):
        return False


def discard(folder: Path) -> None:
    """Takes away a folder that is not needed; where that fails, once more as the command ends.

    Listing a folder takes a file of its own, and a process may have none left until it has closed others.
    """
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _undone.append(folder)


def discard_again() -> None:
    """Tries once more to take away what could not be."""
    while _undone:
        shutil.rmtree(_undone.pop(0), ignore_errors=True)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()
