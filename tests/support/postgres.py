"""A PostgreSQL server for tests: on loopback, in a folder of its own, as its own user where this process is root."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# where Debian keeps them, the newest last
_DEBIAN = Path("/usr/lib/postgresql")
_OWN_USER = "postgres"  # the server refuses to run as root


class Postgres:
    """A server that can be stopped and started again.

    Attributes:
        url: of an empty database, for Optuna.
    """

    def __init__(self, binaries: Path):
        self._binaries = binaries
        self._user = _OWN_USER if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="mergesearch-postgres-"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        name = self._user or getpass.getuser()
        self.url = f"postgresql://{name}@127.0.0.1:{self._port}/postgres"
        self._call("initdb", "-D", self._data, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [str(self._binaries / program), *arguments]

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            self._command(program, *arguments), check=True, user=self._user, cwd=self._folder, capture_output=True
        )

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = ["-D", self._data, "-k", str(self._folder), "-h", "127.0.0.1", "-p", str(self._port), "-F"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", *options), user=self._user, cwd=self._folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        ready = self._command("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self._port))
        while subprocess.run(ready).returncode:
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """Drops every connection at once, as a server does that is restarted in a hurry."""
        if self._process is not None:
            self._call("pg_ctl", "stop", "-D", self._data, "-m", "immediate")
            self._process.wait(timeout=60)
            self._process = None

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def postgres() -> Iterator[Postgres]:
    """A server that runs; skips with a reason where there can be none. For a fixture."""
    found = sorted(_DEBIAN.glob("*/bin"), key=lambda path: int(path.parent.name)) if _DEBIAN.is_dir() else []
    in_path = shutil.which("postgres")
    binaries = found[-1] if found else Path(in_path).parent if in_path else None
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(_OWN_USER)
        except KeyError:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
