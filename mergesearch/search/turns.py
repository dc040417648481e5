"""What one worker of a run does at a time, such as to take a trial.

A turn is a lock in the storage where that is a database on a server, which takes it away from a worker whose connection
is gone; elsewhere a lock on a file in the run folder. Where the server restarts during a turn, another worker may begin
one beside it: so whoever is in a turn looks whether it is still theirs before they write what must be there once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import optuna
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from mergesearch.search.storage import asked, engine_of
from mergesearch.search.store import RunFolder

# seconds between two looks whether it is one's turn, drawn between these, so that workers do not look together
FIRST_LOOKS, LATER_LOOKS = (0.01, 0.03), (0.05, 0.15)
_SOON = 5


@dataclass(frozen=True)
class _Server:
    """How a kind of database locks a name for as long as a connection lasts: 1 or true where it did."""

    lock: str
    unlock: str


# the lock is the connection's own: it is gone with the connection
_MYSQL = _Server(
    "SELECT GET_LOCK(CONCAT('mergesearch ', :key), 0)", "SELECT RELEASE_LOCK(CONCAT('mergesearch ', :key))"
)
_SERVERS = {
    "postgresql": _Server("SELECT pg_try_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
}


class TurnLost(Exception):
    """The turn was taken away: whatever was found in it may not be so any more."""


class Turns:
    """The turns of one run.

    Args:
        storage: of its study.
        folder: its folder.
        name: of its study.
        told: of each turn what was done in it, and the seconds that it was waited for and that it lasted.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        folder: RunFolder,
        name: str,
        told: Callable[[str, float, float], None] = lambda what, waited, lasted: None,
    ):
        self._storage, self._folder, self._name, self._told = storage, folder, name, told
        engine = engine_of(storage)
        self._server = None if engine is None else _SERVERS.get(engine.dialect.name)
        self._engine = engine

    @contextlib.contextmanager
    def turn(self, what: str) -> Iterator[Callable[[], None]]:
        """A context that one worker of the run is in at a time. Its value raises `TurnLost` once that is not so.

        Args:
            what: is done in it; each has turns of its own.

        Raises:
            StorageError: the storage has failed for too long.
        """
        begun = time.monotonic()
        with self._on_server(what) if self._server is not None else self._by_file(what) as check:
            entered = time.monotonic()
            try:
                yield check
            finally:
                self._told(what, entered - begun, time.monotonic() - entered)

    @contextlib.contextmanager
    def _by_file(self, what: str) -> Iterator[Callable[[], None]]:
        with self._folder.lock(what):
            yield lambda: None

    @contextlib.contextmanager
    def _on_server(self, what: str) -> Iterator[Callable[[], None]]:
        assert self._server is not None
        key = _key(f"{self._name}/{what}")
        looks = 0
        while (connection := asked(self._storage, lambda: self._try(key))) is None:
            # no random state of the process is touched
            time.sleep(random.SystemRandom().uniform(*(FIRST_LOOKS if looks < _SOON else LATER_LOOKS)))
            looks += 1
        try:
            yield lambda: _check(connection)
        finally:
            try:
                connection.execute(sqlalchemy.text(self._server.unlock), {"key": key})
                connection.close()
            except SQLAlchemyError:
                connection.invalidate()  # the lock is gone with it

    def _try(self, key: int) -> sqlalchemy.Connection | None:
        """A connection that has the lock; None where another has it."""
        assert self._engine is not None and self._server is not None
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            if connection.scalar(sqlalchemy.text(self._server.lock), {"key": key}):
                return connection
        except BaseException:
            connection.invalidate()
            raise
        connection.close()
        return None


def _check(connection: sqlalchemy.Connection) -> None:
    """`TurnLost` where the connection is gone that had the lock; used again, it would be another one without it."""
    if not connection.invalidated:
        with contextlib.suppress(SQLAlchemyError):
            connection.execute(sqlalchemy.text("SELECT 1"))
            return
    raise TurnLost


def _key(text: str) -> int:
    """63 bits of a text: what PostgreSQL takes as the name of a lock."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
