"""Who is at work on a run: every worker's sign of life, and how the others tell that one is gone.

On one host that is a lock on a file, which the system takes away from whoever ends: it is known at once. Between hosts
locks say nothing (on many network disks each host has its own), so a worker also counts up a number in the study every
`BEAT` seconds. One of another host is gone once that number has stood still for `SILENT` seconds of the reader's own
clock; so is one whose host has the reader's name and a run folder of its own. No two clocks are compared for that;
where they differ, somebody is told, since the hours of a run go by them.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout

from mergesearch import disks, memory
from mergesearch.config import Config
from mergesearch.errors import StorageError, UserError
from mergesearch.search import store
from mergesearch.search.storage import file_of
from mergesearch.search.store import RunFolder

log: logging.Logger = logging.getLogger(__name__)

BEAT = 30.0  # seconds between two signs of life
SILENT = 180.0  # seconds without one after which a worker is gone
# seconds without one after which it is gone where it had long been silent when it was first looked at
BRIEFLY = 2.5 * BEAT
# seconds that two hosts' clocks may differ by before somebody is told
APART = 60.0
_KEY = "worker:"


@dataclass(frozen=True)
class Sign:
    """A worker's last sign of life.

    Attributes:
        worker: its id.
        host, pid, device: where it is at work.
        beat: grows by one with each sign.
        at: when it was given, by its own clock.
        began: when the worker began, likewise.
        ended: whether it has said that it ends.
        doing: what it does for its trial, in words.
        used, memory: bytes in use on its device, and all that it has; None of one that shares the host's.
    """

    worker: str
    host: str
    pid: int
    device: str
    beat: int
    at: datetime
    began: datetime
    ended: bool = False
    doing: str = ""
    used: int | None = None
    memory: int | None = None

    @classmethod
    def from_data(cls, worker: str, data: Mapping[str, Any]) -> Sign:
        """Of what the study holds."""
        times = {key: datetime.fromisoformat(data[key]) for key in ("at", "began")}
        return cls(worker, **{**data, **times})

    def to_data(self) -> dict[str, Any]:
        """As the study holds it."""
        data: dict[str, Any] = {"host": self.host, "pid": self.pid, "device": self.device, "beat": self.beat}
        data |= {"doing": self.doing, "used": self.used, "memory": self.memory}
        return {**data, "at": self.at.isoformat(), "began": self.began.isoformat(), "ended": self.ended}


def signs(study: optuna.Study) -> dict[str, Sign]:
    """The last sign of every worker that a run has had, by id."""
    noted = store.all_noted(study)
    return {
        key.removeprefix(_KEY): Sign.from_data(key.removeprefix(_KEY), data)
        for key, data in noted.items()
        if key.startswith(_KEY)
    }


def signs_of(folder: Path) -> dict[str, Sign]:
    """The same of a run folder; nothing where there is no run yet, or its storage does not answer."""
    try:
        return signs(store.open_run(folder)[1])
    except (UserError, StorageError):
        return {}


def host_of(worker: str) -> str:
    """The host in a worker's id."""
    return worker.rsplit("-", 2)[0]


def check_disk(
    config: Config,
    folder: RunFolder,
    study: optuna.Study | None,
    say: Callable[[str], None],
    mounts: Path | None = None,
) -> None:
    """Looks whether a run lies on a disk that other hosts write too.

    Args:
        config: the run's.
        folder: its folder, which need not be there yet.
        study: the run's, where it has begun.
        say: told of what may go wrong there.
        mounts: the system's table of file systems, where it is not the usual one.

    Raises:
        UserError: the study is SQLite there, and another host is at work on it.
    """
    file = file_of(config.storage) if config.storage else folder.database
    known = {} if mounts is None else {"mounts": mounts}
    kind = disks.shared_kind(file or folder.path, **known)
    if kind is None:
        return
    if file is None:
        say(
            f"note: {folder.path} is on a network disk ({kind}), where locks may not hold between hosts: workers of "
            "several hosts may then propose a candidate twice"
        )
        return
    here = socket.gethostname()
    others = {} if study is None else signs(study)
    fresh = [s.host for s in others.values() if s.host != here and not s.ended and _age(s) < SILENT]
    if fresh:
        raise UserError(
            f"{file} is SQLite on a network disk ({kind}), and {fresh[0]} is at work on it too, which may damage it: "
            "set storage to a database that all hosts reach (postgresql://USER@HOST/NAME), or use one host"
        )
    say(
        f"note: {file} is SQLite on a network disk ({kind}), which is safe for one host alone: for several, set "
        "storage to postgresql://USER@HOST/NAME"
    )


def _age(sign: Sign) -> float:
    return abs((datetime.now(timezone.utc) - sign.at).total_seconds())


def _memory(device: str) -> tuple[int | None, int | None]:
    """Bytes in use on a device, and all that it has; nothing of one that shares the host's."""
    if not device.startswith("cuda"):
        return None, None
    import torch

    try:
        free, whole = memory.of_device(torch.device(device))
    except RuntimeError:  # a candidate's own fault will be met by the candidate
        return None, None
    return whole - free, whole


class Presence:
    """This process among the run's workers, as a context: it gives signs of life as long as it lasts.

    Args:
        folder: the run's.
        study: the run's; its storage may be asked from another thread.
        device: where this worker's candidates live, for the record.
        doing: says in a few words what is done for the trial at work.
        say: told of clocks that differ.
        clock: seconds that only grow.
        now: the time of day.
    """

    def __init__(
        self,
        folder: RunFolder,
        study: optuna.Study,
        *,
        device: str = "cpu",
        doing: Callable[[], str] = str,
        say: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ):
        self.folder, self.study = folder, study
        self.host: str = socket.gethostname()
        self.id: str = f"{self.host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._device, self._doing, self._say, self._clock, self._now = device, doing, say, clock, now
        self._lock = FileLock(self._path(self.id))
        self._began, self._beats = now(), 0
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._go_on, daemon=True, name="presence")
        self._watched: dict[str, _Watched] = {}
        self._unheard = -math.inf  # when the storage last took no sign of ours, or was long about it
        self._told: set[str] = set()  # hosts whose clocks differ

    def __enter__(self) -> Presence:
        self._lock.acquire()
        self._beat(store.note)
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._beating.join(timeout=BEAT)
        self._try_to_beat(ended=True)
        self._lock.release()
        if kind is None:  # else a trial may be left, and the file tells other hosts that nobody is at it
            self._path(self.id).unlink(missing_ok=True)

    # --- its own signs ---

    def _beat(self, note: Callable[[optuna.Study, str, Any], None], ended: bool = False) -> None:
        self._beats += 1
        used, whole = _memory(self._device)
        sign = Sign(
            self.id, self.host, os.getpid(), self._device, self._beats, self._now(), self._began, ended, self._doing(),
            used, whole,
        )  # fmt: skip
        note(self.study, f"{_KEY}{self.id}", sign.to_data())

    def _go_on(self) -> None:
        while not self._over.wait(BEAT):
            self._try_to_beat()

    def _try_to_beat(self, ended: bool = False) -> None:
        begun = self._clock()
        try:
            self._beat(store.note_at_once, ended)
            if self._clock() - begun < BEAT:
                return
        except Exception:  # the work itself will meet the same fault, and say so
            log.debug("no sign of life could be given", exc_info=True)
        self._unheard = self._clock()

    # --- the others' ---

    def is_gone(self, worker: str | None, every: Callable[[], Mapping[str, Sign]] | None = None) -> bool:
        """Whether another worker of this run has ended; one that never left a name counts by who else lives.

        Args:
            worker: its id.
            every: reads the signs, where they are asked for more than once; else they are read anew.
        """
        every = every or cache(lambda: signs(self.study))
        if worker == self.id:
            return False
        if worker is None:
            return all(self.is_gone(other, every) for other in self._others(every()))
        if host_of(worker) == self.host:
            return self._is_gone_here(worker, every)
        sign = every().get(worker)
        if sign is not None:
            return self._is_silent(sign)
        # of a version that gave no signs there may still be a lock
        return self._path(worker).exists() and self._is_left(worker, every)

    def _others(self, every: Mapping[str, Sign]) -> set[str]:
        known = {path.stem for path in self.folder.workers.glob("*.lock")}
        return (known | {worker for worker, sign in every.items() if not sign.ended}) - {self.id}

    def _path(self, worker: str) -> Path:
        return self.folder.workers / f"{worker}.lock"

    def _is_gone_here(self, worker: str, every: Callable[[], Mapping[str, Sign]]) -> bool:
        if self._path(worker).exists():
            return self._is_left(worker, every)
        sign = every().get(worker)  # another host may have this one's name, and a folder of its own
        return sign is None or self._is_silent(sign)

    def _is_left(self, worker: str, every: Callable[[], Mapping[str, Sign]]) -> bool:
        """Whether nobody holds a worker's lock any more; its file is removed, and its sign then says so."""
        try:
            with FileLock(self._path(worker), timeout=0):
                pass
        except Timeout:
            return False
        sign = every().get(worker)
        if sign is not None and not sign.ended:
            store.note(self.study, f"{_KEY}{worker}", replace(sign, ended=True).to_data())
        self._path(worker).unlink(missing_ok=True)
        return True

    def _is_silent(self, sign: Sign) -> bool:
        """Whether a worker of another host has given no sign for long, seen from here."""
        if sign.ended:
            return True
        moment, behind = self._clock(), (self._now() - sign.at).total_seconds()
        watched = self._watched.get(sign.worker)
        if watched is None or watched.beat != sign.beat:
            if watched is not None:
                self._compare_clocks(sign, behind)
            self._watched[sign.worker] = _Watched(sign.beat, moment, long_silent=behind > SILENT)
            return False
        # what took none of ours took none of theirs
        since = max(watched.since, self._unheard)
        return moment - since > (BRIEFLY if watched.long_silent else SILENT)

    def _compare_clocks(self, sign: Sign, behind: float) -> None:
        """Tells of a clock that is off; the sign was given while it was watched, so it is a few beats old at most."""
        if -APART <= behind <= SILENT + APART or sign.host in self._told:
            return
        self._told.add(sign.host)
        ahead = "ahead of" if behind < 0 else "behind"
        self._say(
            f"note: the clock of {sign.host} is {abs(behind):.0f} s {ahead} this host's: the hours of the run go by "
            "them, so set both by the same server"
        )


@dataclass(frozen=True)
class _Watched:
    """A worker's number, and since when it stands there by the reader's clock.

    Attributes:
        long_silent: whether its sign was old by the clocks when it was first seen.
    """

    beat: int
    since: float
    long_silent: bool
