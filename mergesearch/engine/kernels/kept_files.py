"""Tensors kept on disk between runs, by name: written once by whoever is first, mapped into memory by all.

One folder for each name, made beside its place and renamed, so that none is ever seen half written: its tensors as
`0.npy`, `1.npy` and so on, and `about.json` with a digest of each, which is compared before a process first uses one.
What was not used for `DAYS` days goes, and of the rest what was used longest ago while all take more than `limit`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergesearch.engine.kernels.notices import once

log: logging.Logger = logging.getLogger(__name__)

DAYS = 90
# bytes; and of what is free on the disk a half at most
LIMIT = 64 * 2**30
_DAY = 24 * 3600.0


class KeptFiles:
    """A folder of kept tensors.

    Args:
        folder: made if it is not there, for its owner alone.
        limit: the most bytes in it.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder = folder
        self.limit = limit
        self._sound: set[str] = set()
        self._lock = threading.Lock()
        self._unpruned = limit

    @classmethod
    def usual(cls) -> KeptFiles:
        """In `MERGESEARCH_STATISTICS`, or the user's cache folder."""
        chosen = os.environ.get("MERGESEARCH_STATISTICS")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(chosen) if chosen else home / "mergesearch" / "statistics")

    def read(self, name: str) -> list[Tensor] | None:
        """The tensors kept under a name, mapped into memory; None where there are none, or not what was written."""
        place = self.folder / name
        try:
            about = json.loads((place / "about.json").read_text(encoding="utf-8"))
            files = [place / f"{number}.npy" for number in range(len(about["digests"]))]
            if name not in self._sound and [_digest(file) for file in files] != about["digests"]:
                raise ValueError("not what was written")
            tensors = [_mapped(file) for file in files]
            os.utime(place / "about.json")  # the time of its last use
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            once(log, f"{place} is not used and made anew: {error}")
            shutil.rmtree(place, ignore_errors=True)
            return None
        self._sound.add(name)
        return tensors

    def write(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keeps tensors under a name; where that does not go, it is said once and nothing is kept."""
        size = sum(t.nbytes for t in tensors)
        work: str | None = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > shutil.disk_usage(self.folder).free // 2:
                raise OSError("the disk is nearly full")
            self._unpruned += size
            if self._unpruned > self.limit // 64:
                self._prune(size)
            work = tempfile.mkdtemp(prefix="writing-", dir=self.folder)
            digests = []
            for number, tensor in enumerate(tensors):
                file = Path(work) / f"{number}.npy"
                np.save(file, tensor.contiguous().numpy(), allow_pickle=False)
                digests.append(_digest(file))
            (Path(work) / "about.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
            os.rename(work, self.folder / name)
            self._sound.add(name)
        except OSError as error:
            if not (self.folder / name).exists():  # another process was first: it wrote the same
                once(log, f"statistics of the parents are not kept in {self.folder}: {error}; "
                     "name a folder with room in MERGESEARCH_STATISTICS")  # fmt: skip
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)

    def _prune(self, coming: int) -> None:
        """Deletes what nothing used for long, and what there is no room for beside `coming` bytes."""
        with self._lock:
            self._unpruned = 0
            now, total = time.time(), coming
            for age, size, place in sorted(self._kept(now), key=lambda entry: entry[0]):
                total += size
                if total > self.limit or age > DAYS * _DAY:
                    shutil.rmtree(place, ignore_errors=True)

    def _kept(self, now: float) -> list[tuple[float, int, Path]]:
        """For each name the seconds since its last use, its bytes and its folder; what was left half written, too."""
        found = []
        for place in self.folder.iterdir():
            with contextlib.suppress(OSError):
                about = place / "about.json" if not place.name.startswith("writing-") else place
                age = now - about.stat().st_mtime
                found.append((age, sum(f.stat().st_size for f in place.iterdir()), place))
        return found


def _digest(file: Path) -> str:
    told = hashlib.blake2b(digest_size=20)
    with file.open("rb") as opened:
        for part in iter(lambda: opened.read(2**22), b""):
            told.update(part)
    return told.hexdigest()


def _mapped(file: Path) -> Tensor:
    """A file's tensor; what is written to it would not reach the file."""
    # what is empty cannot be mapped
    values: Any = np.load(file, mmap_mode="c" if file.stat().st_size > 4096 else None, allow_pickle=False)
    return torch.from_numpy(values)
