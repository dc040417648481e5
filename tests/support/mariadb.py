"""A MariaDB server for tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

import pytest

from support.servers import Server, running

_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))


class MariaDB(Server):
    own_user = "mysql"

    def __init__(self, server: str, installs: str):
        super().__init__()
        self._server = server
        self.url = f"mysql+pymysql://root@127.0.0.1:{self.port}/runs"
        self.call(
            installs, "--no-defaults", f"--datadir={self.data}", "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )  # fmt: skip

    def command(self) -> Sequence[str]:
        return [
            self._server, "--no-defaults", f"--datadir={self.data}", f"--socket={self.folder / 's'}",
            f"--port={self.port}", "--bind-address=127.0.0.1", "--innodb-flush-log-at-trx-commit=2",
        ]  # fmt: skip

    def answers(self) -> bool:
        import pymysql

        try:
            with pymysql.connect(host="127.0.0.1", port=self.port, user="root") as connection:
                connection.cursor().execute("CREATE DATABASE IF NOT EXISTS runs")
        except pymysql.err.OperationalError:
            return False
        return True


def mariadb() -> Iterator[MariaDB]:
    """A server that runs; skips with a reason where there can be none. For a fixture."""
    server, installs = (shutil.which(name, path=_PATH) for name in ("mariadbd", "mariadb-install-db"))
    if server is None or installs is None:
        pytest.skip("MariaDB is not installed")
    yield from running(MariaDB, lambda: MariaDB(server, installs), "pymysql")
