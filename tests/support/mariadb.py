"""A MariaDB server for tests: on loopback, in a folder of its own, as its own user where this process is root."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.postgres import free_port

_OWN_USER = "mysql"  # the server refuses to run as root
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))


class Mariadb:
    """A server that can be stopped and started again.

    Attributes:
        url: of an empty database, for Optuna.
    """

    def __init__(self, server: str, installs: str):
        self._server = server
        self._user = _OWN_USER if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="mergesearch-mariadb-"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"mysql+pymysql://root@127.0.0.1:{self._port}/runs"
        folders = [f"--datadir={self._folder / 'data'}", "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(
            [installs, "--no-defaults", *folders], check=True, user=self._user, cwd=self._folder, capture_output=True
        )

    def start(self) -> None:
        """Starts it and waits until it answers."""
        import pymysql

        options = [f"--datadir={self._folder / 'data'}", f"--socket={self._folder / 's'}", f"--port={self._port}"]
        options += ["--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=2"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._server, "--no-defaults", *options], user=self._user, cwd=self._folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                with pymysql.connect(host="127.0.0.1", port=self._port, user="root") as connection:
                    connection.cursor().execute("CREATE DATABASE IF NOT EXISTS runs")
                return
            except pymysql.err.OperationalError:
                assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """Drops every connection at once: it is killed."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None

    def remove(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def mariadb() -> Iterator[Mariadb]:
    """A server that runs; skips with a reason where there can be none. For a fixture."""
    server, installs = (shutil.which(name, path=_PATH) for name in ("mariadbd", "mariadb-install-db"))
    if server is None or installs is None:
        pytest.skip("MariaDB is not installed")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(_OWN_USER)
        except KeyError:
            pytest.skip("MariaDB refuses to run as root, and there is no user mysql")
    pytest.importorskip("pymysql", reason="MySQL's driver is not installed")
    there = Mariadb(server, installs)
    try:
        there.start()
        yield there
    finally:
        there.remove()
