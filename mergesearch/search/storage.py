"""The storage of studies: what keeps a URL from being one, what its faults mean, and how they are waited out.

A fault of the storage is never a candidate's. What passes by itself, a server that restarts or a network that drops, is
waited for; what does not, a full disk or a damaged file, ends the run at once. In both cases the same command goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mergesearch.config.storage import PASSWORD, address, check_url, expanded
from mergesearch.errors import HIDDEN, StorageError, UserError, without_passwords

log: logging.Logger = logging.getLogger(__name__)
T = TypeVar("T")

# what a storage raises where it fails; all else is its answer
FAULTS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)


def _faults() -> tuple[type[BaseException], ...]:
    grpc = sys.modules.get("grpc")  # loaded where there is a proxy
    return FAULTS if grpc is None else (*FAULTS, grpc.RpcError)


# milliseconds between two looks whether a proxy that is at work on a call is there
PINGS = 30_000
# seconds in which a proxy has to answer
ANSWERS = 10.0
# seconds between two attempts grow from the first to the last
FIRST_WAIT, LAST_WAIT = 0.5, 30.0
# the package that has a module which a database's dialect needs, where their names differ
PACKAGES = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
    "pymysql": "PyMySQL",
    "mysql": "mysql-connector-python",
}
# the folder beside the run's own file that holds the winner
WINNER = "best"
_FULL = ("disk is full", "no space left", "disk full", "quota exceeded")
_DAMAGED = ("malformed", "not a database", "file is encrypted", "disk image")
_READ_ONLY = ("readonly", "read-only")
_GONE = ("no such table", "unable to open database file", "does not exist")
# errors that the same words to the same database always give
_LASTING = (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.DataError, sqlalchemy.exc.NotSupportedError)


# of Optuna's tables in MySQL and MariaDB those whose values may be no longer than 64 KiB
_NARROW = (
    "SELECT table_name FROM information_schema.columns WHERE table_schema = DATABASE() AND column_name = 'value_json' "
    "AND data_type = 'text' AND table_name IN ('study_user_attributes', 'study_system_attributes', "
    "'trial_user_attributes', 'trial_system_attributes')"
)


# --- before it is opened ----------------------------------------------------------------------------------------------


def checked(url: str) -> str:
    """The URL of a storage as SQLAlchemy takes it, with what the environment holds of it; nothing is written.

    Raises:
        UserError: no storage can be there.
    """
    shown, whole = without_passwords(url), expanded(url)
    try:
        check_url(whole)
    except ValueError as error:  # what the environment holds
        raise UserError(f"storage {shown}: {error}") from None
    try:
        parsed = sqlalchemy.make_url(whole)
        dialect = parsed.get_dialect()
    except sqlalchemy.exc.NoSuchModuleError:
        scheme = shown.partition(":")[0]
        raise UserError(
            f"storage {shown} cannot be opened: {scheme} is no database that SQLAlchemy knows, so use postgresql://, "
            "mysql:// or sqlite:///FILE"
        ) from None
    except (ValueError, sqlalchemy.exc.ArgumentError):
        raise UserError(
            f"storage {shown} cannot be opened: it is no URL of a database; write it as "
            "postgresql://USER@HOST/NAME, with special letters of a password as %40 is for @"
        ) from None
    if dialect.is_async:
        raise UserError(
            f"storage {shown} cannot be opened: {dialect.driver} works asynchronously, so leave +{dialect.driver} out"
        )
    try:
        dialect.import_dbapi()
    except ImportError as error:
        module = (error.name or dialect.driver).partition(".")[0]
        package = PACKAGES.get(module, module)
        raise UserError(
            f"storage {shown} cannot be opened: its driver is not installed, so run `pip install '{package}'`"
        ) from None
    if dialect.name == "sqlite" and parsed.database:
        _check_file(Path(parsed.database), shown)
    return whole


def file_of(url: str) -> Path | None:
    """The file of a SQLite storage; None for a database on a server."""
    parsed = sqlalchemy.make_url(expanded(url))
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def password_of(url: str) -> str | None:
    """The password in a URL, wherever it stands there."""
    parsed = sqlalchemy.make_url(expanded(url))
    among = [parsed.query[name] for name in ("password", "passwd") if name in parsed.query]
    return parsed.password or next((found for found in among if isinstance(found, str)), None)


def _check_file(file: Path, shown: str) -> None:
    if str(file).startswith("file:"):  # with options of SQLite's own
        return
    folder = file.parent
    if file.is_dir():
        raise UserError(f"storage {shown} cannot be opened: {file} is a folder, so name a file in it")
    if not folder.is_dir():
        raise UserError(f"storage {shown} cannot be opened: there is no folder {folder}, so make it first")
    if not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise UserError(f"storage {shown} cannot be opened: {file} may not be written, so name another file")


def proxied(proxy: str) -> BaseStorage:
    """The storage behind a `mergesearch proxy`.

    Raises:
        ConnectionError: it does not answer.
        UserError: what it takes is not installed.
    """
    host, port = address(proxy)
    try:
        import grpc
        from google import protobuf  # noqa: F401 - Optuna loads it only at the first call
    except ImportError:
        raise UserError(
            "storage_proxy needs gRPC, which is not installed: run `pip install 'mergesearch[proxy]'`"
        ) from None
    # a host that is gone without a word would else be waited for as long as TCP does
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.keepalive_time_ms", PINGS),
        ("grpc.keepalive_timeout_ms", int(1000 * ANSWERS)),
    ]

    class Proxied(optuna.storages.GrpcStorageProxy):
        def _setup(self) -> None:
            super()._setup()
            self._channel.close()
            self._channel = grpc.insecure_channel(f"{host}:{port}", options=options)
            self._stub = type(self._stub)(self._channel)
            self._cache = type(self._cache)(self._stub)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = Proxied(host=host, port=port)
    try:
        storage.wait_server_ready(timeout=ANSWERS)
    except ConnectionError:
        raise ConnectionError(f"no answer within {ANSWERS:g} s") from None
    return storage


# --- what its faults mean -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where a study is kept, in words.

    Attributes:
        url: of the storage.
        own: the run's own file, where no storage was named.
        proxy: through which it is read and written; None where it is so itself.
    """

    url: str
    own: Path | None = None
    proxy: str | None = None

    def __str__(self) -> str:
        if self.own is not None:
            return str(self.own)
        return f"storage {without_passwords(self.url)}" + (f" by the proxy {self.proxy}" if self.proxy else "")


def reason(error: BaseException) -> str:
    """What a storage says is wrong, in its own words: the innermost of them, in one line and without passwords."""
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    details = getattr(error, "details", None)  # of gRPC
    lines = str(details() if callable(details) else error).strip().splitlines() or [type(error).__name__]
    return without_passwords(lines[0].strip().rstrip(".") or type(error).__name__)


def passes(error: BaseException) -> bool:
    """Whether a fault may pass by itself."""
    chain, each = [], error
    while each is not None:
        chain.append(each)
        each = each.__cause__
    if any(isinstance(one, _LASTING) for one in chain):
        return False
    return not _says(error, *_FULL, *_DAMAGED, *_READ_ONLY, *_GONE)


def refused(location: Location, error: BaseException) -> UserError:
    """Why a storage could not be opened."""
    why = reason(error)
    if location.own is not None:
        return UserError(
            _of_file(location.own, error) or f"{location} cannot be opened ({why}): free it, or set output anew"
        )
    if _says(error, *_DAMAGED):
        return UserError(f"{location} is damaged ({why}): put a copy of it back, or set storage and output to new ones")
    if location.proxy is not None:
        return UserError(
            f"{location} cannot be opened ({why}): start `mergesearch proxy` there, or leave storage_proxy out"
        )
    if HIDDEN in location.url:
        return UserError(
            f"{location} cannot be opened ({why}): its password is not kept in the run folder, so set {PASSWORD} to it "
            "in the environment"
        )
    return UserError(f"{location} cannot be opened ({why}): check that the server is there, and the URL")


def failed(location: Location, error: BaseException, waited: float = 0.0) -> StorageError:
    """Why a run cannot go on for now."""
    again = "what was scored is kept, and the same command goes on"
    of_file = _of_file(location.own, error) if location.own is not None and not passes(error) else None
    if of_file is not None:
        return StorageError(of_file)
    if _says(error, *_FULL):
        return StorageError(f"the disk of {location} is full ({reason(error)}): free some space; {again}")
    if waited:
        minutes = f"{waited / 60:.0f} minutes" if waited >= 60 else f"{waited:.0f} s"
        return StorageError(
            f"{location} has not answered for {minutes} ({reason(error)}): {again} once the storage is there"
        )
    return StorageError(f"{location} does not answer ({reason(error)}): {again} once that is mended")


def _of_file(file: Path, error: BaseException) -> str | None:
    """What is wrong with the run's own file; None where that is nothing of the file."""
    if _says(error, *_FULL):
        return f"the disk with {file} is full: free some space; what was scored is kept, and the same command goes on"
    if _says(error, *_DAMAGED):
        kept = "; the winner in best/ beside it is no part of it" if (file.parent / WINNER).is_dir() else ""
        return f"{file} is damaged ({reason(error)}): put a copy of it back, or set output and name to new ones{kept}"
    if _says(error, *_READ_ONLY):
        return f"{file} may not be written: give yourself the right to, or set output to another folder"
    if _says(error, *_GONE):
        return f"{file} is not there any more, or incomplete ({reason(error)}): put a copy of it back, or start anew"
    return None


def _says(error: BaseException, *words: str) -> bool:
    told = f"{reason(error)} {error}".lower()
    return any(word in told for word in words)


# --- asked again ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
    """How long a storage that fails is asked again.

    Attributes:
        seconds: after which it is given up; 0: at once.
        say: told that it is waited for, and that it answers again.
        clock, sleep: how time passes.
    """

    seconds: float = 0.0
    say: Callable[[str], None] = log.warning
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def asked_again(
    call: Callable[[], T], location: Location, patience: Patience, again: Callable[[], T] | None = None
) -> T:
    """What a call to a storage answers, made again as long as the patience lasts.

    Args:
        again: in place of the call from the second attempt on.

    Raises:
        StorageError: the patience is at its end, or the fault does not pass by itself.
    """
    attempt, wait = call, FIRST_WAIT
    begun: float | None = None
    while True:
        try:
            answer = attempt()
        except _faults() as error:
            if not patience.seconds or not passes(error):
                raise failed(location, error) from error
            now = patience.clock()
            if begun is None:
                begun = now
                patience.say(f"note: {location} does not answer ({reason(error)}): asking again")
            left = begun + patience.seconds - now
            if left <= 0:
                raise failed(location, error, now - begun) from error
            patience.sleep(min(wait, left))
            wait, attempt = min(2 * wait, LAST_WAIT), again or call
            continue
        if begun is not None:
            patience.say(f"note: {location} answers again")
        return answer


class PatientStorage(BaseStorage):
    """A storage that is asked again where it fails.

    A call may have done its work although its answer was lost. So what must not be done twice is looked for before it
    is done again.

    Args:
        storage: the storage itself.
        location: where it is, in words.
        patience: how long it is asked again.
        engine: of its database, where the storage itself does not know it.

    Raises:
        StorageError: by every method, once the patience is at its end or the fault does not pass by itself.
    """

    def __init__(
        self, storage: BaseStorage, location: Location, patience: Patience, engine: sqlalchemy.Engine | None = None
    ):
        self._storage, self._location, self._patience, self.engine = storage, location, patience, engine
        self._may_add: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def adding(self, may_add: Callable[[], None]) -> Iterator[None]:
        """A context in which a trial is added only if a look before each attempt raises nothing."""
        before, self._may_add = self._may_add, may_add
        try:
            yield
        finally:
            self._may_add = before

    def _ask(self, call: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        return asked_again(call, self._location, self._patience, again)

    # --- studies ---

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        return self._ask(lambda: self._storage.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        self._ask(lambda: self._storage.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._ask(lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._ask(lambda: self._storage.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._ask(lambda: self._storage.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._ask(lambda: self._storage.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._ask(lambda: self._storage.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._ask(lambda: self._storage.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._ask(lambda: self._storage.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        return self._ask(self._storage.get_all_studies)

    # --- trials ---

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        def create() -> int:
            self._may_add()
            return self._storage.create_new_trial(study_id, template_trial)

        def find_or_create() -> int:
            there = None if template_trial is None else self._find(study_id, template_trial)
            return create() if there is None else there

        return self._ask(create, find_or_create)

    def _find(self, study_id: int, template: FrozenTrial) -> int | None:
        """A trial made of a template: whoever adds one holds the run's lock, and no two that wait are alike."""
        for trial in reversed(self._storage.get_all_trials(study_id, deepcopy=False, states=(template.state,))):
            if trial.user_attrs == template.user_attrs:
                return trial._trial_id
        return None

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._ask(lambda: self._storage.set_trial_param(trial_id, param_name, param_value_internal, distribution))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        def change() -> bool:
            return self._storage.set_trial_state_values(trial_id, state, values)

        def change_or_find() -> bool:
            try:
                # a trial is taken under the run's lock: that it is taken already was this call's doing
                return change() or self._storage.get_trial(trial_id).state == state
            except UpdateFinishedTrialError:
                if self._storage.get_trial(trial_id).state == state:
                    return True
                raise

        return self._ask(change, change_or_find)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        self._ask(lambda: self._storage.set_trial_intermediate_value(trial_id, step, intermediate_value))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._ask(lambda: self._storage.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._ask(lambda: self._storage.set_trial_system_attr(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self._ask(lambda: self._storage.get_trial(trial_id))

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._ask(lambda: self._storage.get_trial_id_from_study_id_trial_number(study_id, trial_number))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._ask(lambda: self._storage.get_all_trials(study_id, deepcopy, states))

    def remove_session(self) -> None:
        self._storage.remove_session()


def patient(
    storage: BaseStorage,
    location: Location,
    patience: Patience | None = None,
    engine: sqlalchemy.Engine | None = None,
) -> BaseStorage:
    """A storage whose faults are the run's and no candidate's; see `PatientStorage`."""
    # what Optuna would put around a database, which it does not see any more
    cached = optuna.storages.get_storage(storage)
    return PatientStorage(cached, location, patience or Patience(), engine)


def at_once(storage: BaseStorage) -> BaseStorage:
    """The storage within a patient one: a call that fails is not made again."""
    return storage._storage if isinstance(storage, PatientStorage) else storage


def asked(storage: BaseStorage, call: Callable[[], T]) -> T:
    """What a call to a storage's own database answers, made again as the storage's calls are.

    Raises:
        StorageError: likewise.
    """
    return storage._ask(call) if isinstance(storage, PatientStorage) else call()


def adding(storage: BaseStorage, may_add: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """A context in which trials are added to a storage under a condition; see `PatientStorage.adding`."""
    return storage.adding(may_add) if isinstance(storage, PatientStorage) else contextlib.nullcontext()


def opened(given: str | BaseStorage) -> BaseStorage:
    """Optuna's storage in a database on a server. In MySQL and MariaDB its tables hold values of 64 KiB, which a recipe
    for each tensor may exceed: the columns are made wider, also of tables that were there.

    Args:
        given: a URL, as `checked` gives it, or the storage by itself.
    """
    storage = optuna.storages.get_storage(given)
    engine = engine_of(storage)
    if engine is None or engine.dialect.name not in ("mysql", "mariadb"):
        return storage
    with engine.begin() as connection:
        for table in connection.scalars(sqlalchemy.text(_NARROW)).all():
            connection.execute(sqlalchemy.text(f"ALTER TABLE {table} MODIFY value_json LONGTEXT"))
    return storage


def engine_of(storage: BaseStorage) -> sqlalchemy.Engine | None:
    """The database behind a storage; None for a storage without one."""
    if isinstance(storage, PatientStorage) and storage.engine is not None:
        return storage.engine
    inner = at_once(storage)
    inner = getattr(inner, "_backend", inner)  # of Optuna's cache before it
    return inner.engine if isinstance(inner, optuna.storages.RDBStorage) else None
