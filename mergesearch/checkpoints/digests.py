"""What tells the weights of a parent from others: names, shapes, dtypes and bytes of its tensors, never dates.

Blocks of every tensor come first, which is quick for any size and finds nearly every change. All bytes are read once
and remembered with what the file system says of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergesearch import leftovers
from mergesearch.checkpoints.files import Source, read_headers, read_json, weight_files
from mergesearch.errors import UserError

# A file may be written twice within what its times resolve (2 s at worst), by another host's clock, or be mapped and
# its times be late: bytes are remembered only of files that had been left alone so many seconds before they were read.
SETTLED = 60.0
# of each tensor, the first, the middle and the last so many bytes
_BLOCK = 4096
_CHUNK = 4 * 2**20
# of an adapter's configuration, what says where it comes from and not what it does
_ORIGIN = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

# file -> inode, size, time of writing, time of any change
Stamps = dict[str, list[int]]


@dataclass(frozen=True)
class Digest:
    """Of a parent's weights.

    Attributes:
        form: of the tensors' names, shapes and dtypes, and of what an adapter's configuration does with them.
        size: bytes of all tensors.
        blocks: of some bytes of each tensor.
        whole: of all bytes; None where they were not read.
    """

    form: str
    size: int
    blocks: str
    whole: str | None = None

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Digest:
        """Back from `to_data`."""
        return cls(data["form"], data["size"], data["blocks"], data["whole"])

    def is_of_the_same(self, other: Digest) -> bool:
        """Whether two digests are of equal weights, as far as both read them."""
        return (self.form, self.size, self.blocks) == (other.form, other.size, other.blocks) and (
            None in (self.whole, other.whole) or self.whole == other.whole
        )


def stamps(source: Source, where: str) -> Stamps:
    """What the file system says of each file that makes the weights.

    Raises:
        UserError: the files are not there.
    """
    files = [file for folder, stem in _parts(source) for file in weight_files(folder, where, stem)]
    files += [source.adapter / "adapter_config.json"] if source.adapter else []
    return {str(file): _stamp(file, where) for file in files}


def difference(source: Source, where: str, noted: Digest, memory: Memory) -> str | None:
    """How weights differ from what was noted of them, in words; None where they do not.

    Raises:
        UserError: the files are not there, cannot be read, or are written meanwhile.
    """
    known = memory.recall(stamps(source, where))
    found = known or _read(source, where, whole=False)
    if found.form != noted.form:
        return "they are other tensors"
    if found.blocks == noted.blocks and found.whole is None:
        found = digest(source, where, memory)
    return "their numbers are others" if (found.blocks, found.whole) != (noted.blocks, noted.whole) else None


def digest(source: Source, where: str, memory: Memory) -> Digest:
    """The digest of all bytes.

    Raises:
        UserError: the files are not there, cannot be read, or are written meanwhile.
    """
    before, begun = stamps(source, where), time.time()
    known = memory.recall(before)
    if known is not None:
        return known
    found = _read(source, where, whole=True)
    if stamps(source, where) != before:
        raise UserError(f"{where}: the weights in {source.path} are being written: wait for that and start again")
    memory.keep(before, begun, found)
    return found


class Memory:
    """Digests by what the file system says of the files, in a file of the run folder: who could plant one there could
    as well write the study.

    Args:
        path: of the file, made when there is something to keep; None remembers nothing. One that cannot be read or
            written costs time alone.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def recall(self, files: Stamps) -> Digest | None:
        """The digest of files that are untouched since they were read."""
        entry = self._entries().get(_key(files))
        try:
            if entry is not None and entry["files"] == files:
                return Digest.from_data(entry["digest"])
        except (KeyError, TypeError):
            pass
        return None

    def keep(self, files: Stamps, begun: float, found: Digest) -> None:
        """Remembers a digest, if no change of the files since can go unnoticed.

        Args:
            files: as they were before they were read.
            begun: when reading began, in seconds since 1970.
            found: what was read.
        """
        last = max((max(written, changed) for _, _, written, changed in files.values()), default=0)
        if self.path is None or begun - last / 1e9 < SETTLED:
            return
        entries = {**self._entries(), _key(files): {"files": files, "digest": found.to_data()}}
        # what cannot be kept is read again
        with contextlib.suppress(OSError), leftovers.writing(self.path) as partial:
            partial.write_text(json.dumps(entries), encoding="utf-8")

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


def _key(files: Stamps) -> str:
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]


def file_digest(file: Path) -> str:
    """Of all bytes of a file."""
    hashed = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    name: str
    said: str
    file: Path
    start: int
    length: int

    def sampled(self, opened: int) -> str:
        """Of some of its bytes."""
        hashed = hashlib.sha256()
        for offset in sorted({0, max(0, (self.length - _BLOCK) // 2), max(0, self.length - _BLOCK)}):
            hashed.update(self._bytes(opened, offset, min(_BLOCK, self.length - offset)))
        return hashed.hexdigest()

    def hashed(self, opened: int) -> str:
        """Of all of them."""
        hashed = hashlib.sha256()
        for offset in range(0, self.length, _CHUNK):
            hashed.update(self._bytes(opened, offset, min(_CHUNK, self.length - offset)))
        return hashed.hexdigest()

    def _bytes(self, opened: int, offset: int, count: int) -> bytes:
        # not mapped: a file that is cut meanwhile would end the process
        return os.pread(opened, count, self.start + offset)


def _read(source: Source, where: str, whole: bool) -> Digest:
    places = sorted(_places(source, where), key=lambda place: place.name)
    does = json.dumps(_settings(source, where), sort_keys=True)
    form = _combined([does, *(f"{place.name} {place.said}" for place in places)])
    opened: dict[Path, int] = {}
    try:
        for place in places:
            if place.file not in opened:
                opened[place.file] = os.open(place.file, os.O_RDONLY)
        blocks = _combined(place.sampled(opened[place.file]) for place in places)
        every = None
        if whole:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                every = _combined(pool.map(lambda place: place.hashed(opened[place.file]), places))
    except OSError as error:
        raise _unreadable(source.path, where, error) from None
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return Digest(form, sum(place.length for place in places), blocks, every)


def _parts(source: Source) -> list[tuple[Path, str]]:
    """The folders that hold a parent's weights, and what their files are called."""
    parts = [(source.folder, "model")] if source.folder is not None else []
    return parts + ([(source.adapter, "adapter_model")] if source.adapter is not None else [])


def _places(source: Source, where: str) -> list[_Place]:
    found = []
    for folder, stem in _parts(source):
        read_headers(folder, where, stem)  # refuses what is no whole file, in the words of whoever loads it
        for file in weight_files(folder, where, stem):
            try:
                with file.open("rb") as opened:
                    length = struct.unpack("<Q", opened.read(8))[0]
                    header = json.loads(opened.read(length))
            except (OSError, ValueError, struct.error) as error:
                raise _unreadable(file, where, error) from None
            header.pop("__metadata__", None)
            for name, told in header.items():
                begin, end = told["data_offsets"]
                said = f"{told['dtype']} {told['shape']}"
                found.append(_Place(f"{stem} {name}", said, file, 8 + length + begin, end - begin))
    return found


def _settings(source: Source, where: str) -> Any:
    """What an adapter's configuration does with its weights."""
    if source.adapter is None:
        return None
    settings = read_json(source.adapter / "adapter_config.json", where)
    if not isinstance(settings, dict):
        return settings
    kept = {key: value for key, value in settings.items() if key not in _ORIGIN}
    # peft writes sets in an order of their own
    return {key: sorted(map(str, value)) if isinstance(value, list) else value for key, value in kept.items()}


def _combined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stamp(file: Path, where: str) -> list[int]:
    try:
        told = file.stat()
    except OSError as error:
        raise _unreadable(file, where, error) from None
    return [told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns]


def _unreadable(path: Path, where: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{where}: {path} cannot be read ({reason}): check its permissions, or fetch it again")


__all__ = ["Digest", "Memory", "difference", "digest", "file_digest", "stamps"]
