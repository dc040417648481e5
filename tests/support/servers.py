"""A database server for tests: on loopback, in a folder of its own, as its own user where this process is root."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import pytest

S = TypeVar("S", bound="Server")


class Server(ABC):
    """A server that can be stopped and started again.

    Attributes:
        own_user: who runs it where this process is root, as whom it refuses to run.
        url: of an empty database, for Optuna.
    """

    own_user: ClassVar[str]
    url: str

    def __init__(self) -> None:
        self.user: str | None = self.own_user if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="mergesearch-server-"))
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What runs it."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it does, with the database there."""

    def call(self, *command: str) -> None:
        """Runs a program of the server's to its end, as who runs the server."""
        subprocess.run(command, check=True, user=self.user, cwd=self.folder, capture_output=True)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), user=self.user, cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self.answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Drops every connection at once, as a server does that is restarted in a hurry."""
        if self._process is not None:
            self.end(self._process)
            self._process.wait(timeout=60)
            self._process = None

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()

    def remove(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def running(kind: type[S], make: Callable[[], S], driver: str) -> Iterator[S]:
    """A server that runs; skips with a reason where there can be none."""
    name = kind.__name__
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(kind.own_user)
        except KeyError:
            pytest.skip(f"{name} refuses to run as root, and there is no user {kind.own_user}")
    pytest.importorskip(driver, reason=f"{name}'s driver is not installed")
    there = make()
    try:
        there.start()
        yield there
    finally:
        there.remove()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
