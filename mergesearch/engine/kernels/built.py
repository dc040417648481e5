"""Built kernels on disk: private, checked before they are loaded, built once by however many processes.

A library that is loaded can do whatever its owner's processes can, so two things are asked of it. Nobody else can have
written it: the folder is made for its owner alone (0700), and a folder or file that belongs to somebody else, or that
others can write to, is refused, as is a folder in one where others could put another in its place. And it is what was
built from the source at hand: its key is a hash of the source, the compiler, its version, its flags and the processor,
and beside it lies a record of that key and of the library's own digest; a library of the right name without such a
record, or with another's, is built anew.

Each key has a lock. Who holds it looks, builds and loads; the others wait and then find what they need. Files are
written beside their place and renamed, so that none is ever seen half written. A key that nothing loaded for `DAYS`
days, or that is older than the newest `MOST`, goes at the next build: it is deleted under its lock, so never between
another process's check and its loading, and a library that is loaded already stays mapped without its file.

What Triton compiles lies in Triton's own cache, which keeps no digests: a private folder in this one, and where the
user has set TRITON_CACHE_DIR that folder, which is then trusted as its owner trusts it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from mergesearch.engine.kernels.notices import once

log: logging.Logger = logging.getLogger(__name__)

# how many libraries this process had "compiled", and how many it "found" on disk
counts: Counter[str] = Counter()
DAYS, MOST = 90, 512
# seconds that one process waits for another that builds the same kernel
PATIENCE = 300.0
_DAY = 24 * 3600.0
# what an earlier version left, and what Triton keeps: folders that are pruned as a whole
_TREES = ("inductor", "triton*")


class _Refused(Exception):
    """Something on disk is not to be trusted; the message says what and why."""


def key_of(*parts: str) -> str:
    """The name of what is built from `parts`: 32 hex digits."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def wanted_folder() -> Path:
    """Where built kernels should be kept: `MERGESEARCH_KERNELS`, or the user's cache folder."""
    chosen = os.environ.get("MERGESEARCH_KERNELS")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "mergesearch" / "kernels"


def folder() -> Path:
    """Where built kernels are kept: the wanted folder where it is private, else a temporary one of this process."""
    return _private(wanted_folder())


@cache
def _private(wanted: Path) -> Path:
    try:
        for folder in (*reversed(wanted.parents), wanted):
            folder.mkdir(mode=0o700, exist_ok=True)  # all of them private, whatever the umask leaves to others
        real = wanted.resolve()
        for path in (wanted, real):
            _trust(path)
        for above in real.parents:
            _trust_above(above)
        if real.stat().st_mode & 0o077:
            real.chmod(0o700)
    except (OSError, _Refused) as error:
        return _instead(wanted, error)
    return real  # a link on the way to it may change


def _instead(wanted: Path, error: Exception) -> Path:
    """A temporary folder in the place of a wanted one, with the line that says so."""
    once(
        log,
        f"kernels are built anew for this process, in a temporary folder, and not kept in {wanted}: {error}; "
        "remove what is there, or name a folder of your own in MERGESEARCH_KERNELS",
    )
    return _temporary()


@cache
def _temporary() -> Path:
    made = Path(tempfile.mkdtemp(prefix="mergesearch-kernels-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _trust(path: Path) -> None:
    """Raises `_Refused` where somebody else owns a folder or file, or can write to it."""
    about = path.lstat()
    if hasattr(os, "geteuid") and about.st_uid != os.geteuid():
        raise _Refused(f"{path} belongs to another user")
    # what a link's own mode is says nothing: what it leads to is looked at apart
    if not stat.S_ISLNK(about.st_mode) and about.st_mode & 0o022:
        raise _Refused(f"others can write to {path}")


def _trust_above(folder: Path) -> None:
    """Raises `_Refused` where somebody else could put another folder in the place of one in this folder."""
    about = folder.stat()
    if hasattr(os, "geteuid") and about.st_uid not in (os.geteuid(), 0):
        raise _Refused(f"{folder} belongs to another user")
    if about.st_mode & stat.S_ISVTX:  # nobody renames what is another's there
        return
    if about.st_mode & 0o002 or (about.st_mode & 0o020 and not _is_mine_alone(about.st_gid)):
        raise _Refused(f"others can write to {folder}")


def _is_mine_alone(group: int) -> bool:
    """Whether a group is the one of its own that many systems give each user, whose files are group-writable there."""
    try:
        import grp
        import pwd

        me, about = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except (ImportError, KeyError):
        return False
    return about.gr_name == me and set(about.gr_mem) <= {me}


def load(key: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """The library of a key, from disk or built; other processes that want it meanwhile wait for this one.

    Args:
        build: writes the library to the path that it is given.

    Raises:
        RuntimeError: `build` failed, or what it built cannot be loaded.
    """
    try:
        return _load(folder(), key, build)
    except (OSError, NotImplementedError, _Refused) as error:
        instead = _instead(wanted_folder(), error)
    try:
        return _load(instead, key, build)
    except (OSError, _Refused) as error:
        raise RuntimeError(str(error)) from error


def _load(place: Path, key: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    library, record = _files(place, key)
    with lock(key, place):
        if _sound(library, record, key):
            counts["found"] += 1
        else:
            with tempfile.TemporaryDirectory(prefix="building-", dir=place) as work:
                _build(Path(work), library, record, key, build)
            counts["compiled"] += 1
        os.utime(record)  # the time of its last use, for `prune`
        loaded = ctypes.CDLL(str(library))
    prune(place)
    return loaded


def _files(place: Path, key: str) -> tuple[Path, Path]:
    return place / f"{key}.so", place / f"{key}.json"


def _sound(library: Path, record: Path, key: str) -> bool:
    """Whether a library is there and is what was built.

    Raises:
        _Refused: somebody else may have written it.
    """
    for path in (library, record):
        if os.path.lexists(path):
            _trust(path)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise _Refused(f"{path} is no plain file")
    if not library.exists():
        return False
    try:
        about = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    if about == _about(key, library):
        return True
    once(log, f"{library} is not what was built there: it is not loaded, and built anew")
    return False


def _about(key: str, library: Path) -> dict[str, str]:
    return {"key": key, "library": hashlib.blake2b(library.read_bytes(), digest_size=32).hexdigest()}


def _build(work: Path, library: Path, record: Path, key: str, build: Callable[[Path], None]) -> None:
    """Builds beside and renames; the record first, so that no library is without one but by another's hand."""
    fresh, about = _files(work, key)
    build(fresh)
    about.write_text(json.dumps(_about(key, fresh)), encoding="utf-8")
    fresh.chmod(0o700)  # whatever the umask: `_trust` refuses what a group can write to
    about.chmod(0o600)
    os.replace(about, record)
    os.replace(fresh, library)


@contextlib.contextmanager
def lock(key: str, place: Path | None = None) -> Iterator[None]:
    """Within it no other process builds, loads or deletes this key.

    Raises:
        OSError: the lock cannot be had, or another process kept it for `PATIENCE` seconds.
    """
    with FileLock(str((place or folder()) / f"{key}.lock"), timeout=PATIENCE):
        yield


def write(name: str, text: str) -> Path:
    """A text file in the folder, written anew where it holds something else; what is in it is never trusted."""
    path = folder() / name
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and not path.is_symlink() and path.read_text(encoding="utf-8") == text:
            os.utime(path)
            return path
    handle, fresh = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(fresh, path)
    return path


def prune(place: Path, days: float = DAYS, most: int = MOST) -> None:
    """Deletes what was not used for `days` days, and of the rest all but the `most` used last."""
    now = time.time()
    used = {path.stem: age for path in place.glob("*.json") if (age := _age(path, now)) is not None}
    used |= {path.stem: age for path in place.glob("*.so")
             if path.stem not in used and (age := _age(path, now)) is not None}  # fmt: skip
    youngest = sorted(used, key=lambda key: used[key])
    for place_in_line, key in enumerate(youngest):
        if place_in_line >= most or used[key] > days * _DAY:
            _delete(place, key)
    for path in (
        *place.glob("mergesearch_*.py"),
        *place.glob("building-*"),
        *(t for p in _TREES for t in place.glob(p)),
    ):
        limit = _DAY if path.name.startswith("building-") else days * _DAY
        age = _youngest(path, now)
        if age is not None and age > limit:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _delete(place: Path, key: str) -> None:
    path = place / f"{key}.lock"
    with contextlib.suppress(Timeout, OSError, NotImplementedError), FileLock(str(path), timeout=0):
        for file in (*_files(place, key), path):
            file.unlink(missing_ok=True)


def _age(path: Path, now: float) -> float | None:
    """Seconds since a file was last used or written; None where it is gone."""
    try:
        return now - path.lstat().st_mtime
    except OSError:
        return None


def _youngest(path: Path, now: float) -> float | None:
    """As `_age`, of the youngest file or folder in a tree."""
    ages = [_age(one, now) for one in (path, *path.rglob("*"))]
    return min((age for age in ages if age is not None), default=None)
