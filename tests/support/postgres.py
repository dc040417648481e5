"""A PostgreSQL server for tests."""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.servers import Server, running

# where Debian keeps them, the newest last
_DEBIAN = Path("/usr/lib/postgresql")


class PostgreSQL(Server):
    own_user = "postgres"

    def __init__(self, binaries: Path):
        super().__init__()
        self._binaries = binaries
        self.url = f"postgresql://{self.user or getpass.getuser()}@127.0.0.1:{self.port}/postgres"
        self.call(self._program("initdb"), "-D", str(self.data), "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def _program(self, name: str) -> str:
        return str(self._binaries / name)

    def command(self) -> Sequence[str]:
        place = ["-D", str(self.data), "-k", str(self.folder), "-h", "127.0.0.1", "-p", str(self.port)]
        return [self._program("postgres"), *place, "-F"]

    def answers(self) -> bool:
        ready = [self._program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return not subprocess.run(ready).returncode

    def end(self, process: subprocess.Popen[bytes]) -> None:
        self.call(self._program("pg_ctl"), "stop", "-D", str(self.data), "-m", "immediate")


def postgres() -> Iterator[PostgreSQL]:
    """A server that runs; skips with a reason where there can be none. For a fixture."""
    found = sorted(_DEBIAN.glob("*/bin"), key=lambda path: int(path.parent.name)) if _DEBIAN.is_dir() else []
    in_path = shutil.which("postgres")
    binaries = found[-1] if found else Path(in_path).parent if in_path else None
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    yield from running(PostgreSQL, lambda: PostgreSQL(binaries), "psycopg")
