"""The run folder and the study in its storage: what a run leaves behind, and how it is taken up again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy
from filelock import FileLock
from sqlalchemy import event
from sqlalchemy.pool import NullPool

from mergesearch import leftovers
from mergesearch.config import Config
from mergesearch.errors import StorageError, UserError
from mergesearch.schema import read_yaml, validate
from mergesearch.search.objective import Objective
from mergesearch.search.storage import (
    WINNER,
    Location,
    Patience,
    asked_again,
    at_once,
    checked,
    file_of,
    opened,
    patient,
    proxied,
    refused,
)

if TYPE_CHECKING:
    from mergesearch.search.artifacts import Artifacts

log: logging.Logger = logging.getLogger(__name__)

# where the study notes what tells its parents and documents from others
DIGESTS = "digests"
CONFIG, DOCUMENTS = "config.yaml", "documents.json"
# seconds for which the storage of a run that has begun is asked again when it is opened
OPENING = 60.0
# how often a database is copied that is written meanwhile
_COPIES = 5
_WRITES_IT = "start `mergesearch run` again, which writes it and goes on from what is there"
# where a study notes with how many trials its workers were through
_ENDED = "ended"
# what a study holds: raised when an older version's trials can no longer be read
FORMAT = 2


class RunFolder:
    """The files of one run: `config.yaml`, `study.db` unless another storage is named, `scores/NUMBER.npz`
    (per-document scores), `documents.json` (what the search and the holdout score on), `holdout/` (the report),
    `workers/` (locks), `digests.json` (of models' files that need not be read again)."""

    def __init__(self, path: str | Path):
        self.path: Path = Path(path)

    @classmethod
    def prepare(cls, config: Config) -> RunFolder:
        """The run folder of a configuration, made if need be.

        Raises:
            UserError: it holds another configuration, or something else, or cannot be written.
        """
        folder = cls(config.folder)
        folder.check(config)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            # first, since a folder that has it is a run folder
            write_atomically(folder.path / CONFIG, config.to_yaml())
            folder.scores.mkdir(exist_ok=True)
            folder.workers.mkdir(exist_ok=True)
            folder.clear()
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {folder.path} ({error.strerror}): set output to another"
            ) from None
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder; `UserError` where there is none."""
        if not (Path(path) / CONFIG).is_file():
            raise UserError(
                f"{path} is no run folder (it has no {CONFIG}): name the output folder of `mergesearch run`"
            )
        return cls(path)

    def clear(self) -> None:
        """Takes away what killed workers of this machine were writing."""
        for folder in (self.path, self.scores, self.holdout, self.fresh, self.learning(0).parent):
            leftovers.clear(folder)

    def check(self, config: Config) -> None:
        """`UserError` where the folder holds another configuration, or something else."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"output {self.path} is a file: set output to a folder")
        foreign = any(_is_foreign(entry.name) for entry in self.path.iterdir())
        if not (self.path / CONFIG).is_file():  # looked for last: another worker may begin the run at this moment
            if foreign:
                raise UserError(f"{self.path} is not empty and no run folder: set output to a new folder")
            return
        check_same(config, self.config(), str(self.path))

    def config(self) -> Config:
        """The configuration of the run; its paths are absolute."""
        return validate(Config, read_yaml(self.path / CONFIG), str(self.path / CONFIG))

    @property
    def scores(self) -> Path:
        return self.path / "scores"

    @property
    def database(self) -> Path:
        """The default storage."""
        return self.path / "study.db"

    @property
    def workers(self) -> Path:
        return self.path / "workers"

    @property
    def best(self) -> Path:
        """Where `mergesearch run` leaves the winner."""
        return self.path / WINNER

    @property
    def fresh(self) -> Path:
        """Where the next `best` and the last one stand for a moment."""
        return self.path / ".best"

    @property
    def holdout(self) -> Path:
        """What the report on the holdout keeps."""
        return self.path / "holdout"

    def documents(self, number: int) -> Path:
        """Where a trial's per-document scores are; got from the run's artifacts where another host wrote them."""
        path = self.scores / f"{number:05d}.npz"
        if not path.exists():
            self.fetch(path)
        return path

    @property
    def expected(self) -> Path:
        """Where it is kept what trials are expected to score elsewhere."""
        return self.path / "expected.json"

    def blocks(self, recipe_id: str) -> Path:
        """Where the answers of a recipe that is not scored to the end are, block by block."""
        return self.scores / "blocks" / recipe_id

    @property
    def scored(self) -> int:
        """Of how many trials there are per-document scores."""
        return sum(1 for _ in self.scores.glob("*.npz"))

    def learning(self, number: int) -> Path:
        """Where the state of the soup that a trial learns is."""
        return self.path / "learning" / f"{number:05d}"

    def search_documents(self) -> dict[str, list[int]]:
        """The documents that the search scores on, as `lm_eval --samples` takes them."""
        return self._drawn("search")

    def holdout_documents(self) -> dict[str, list[int]]:
        """The documents that only the report scores on, likewise."""
        return self._drawn("holdout")

    def _drawn(self, side: str) -> dict[str, list[int]]:
        file = self.path / DOCUMENTS
        try:
            drawn = json.loads(file.read_text(encoding="utf-8"))[side]
            if isinstance(drawn, dict) and all(isinstance(numbers, list) for numbers in drawn.values()):
                return drawn
            why = "it is damaged"
        except OSError as error:
            why = error.strerror or "it cannot be read"
        except (ValueError, KeyError, TypeError, RecursionError):
            why = "it is damaged"
        raise UserError(f"{file} does not say which documents the run uses ({why}): {_WRITES_IT}")

    # --- what hosts that share no disk have in common ---

    @property
    def artifacts(self) -> Artifacts | None:
        """Where the files that trials leave are kept beside this folder; None where they are here alone."""
        file = self.path / CONFIG
        try:
            return _artifacts(file, file.stat().st_mtime_ns)
        except OSError:
            return None

    def keep(self, path: Path) -> None:
        """Keeps a file of this folder where other hosts find it, if the run says where.

        Raises:
            OSError: it could not be kept.
        """
        if self.artifacts is not None and path.is_file():
            self.artifacts.put(path.relative_to(self.path).as_posix(), path)

    def fetch(self, path: Path) -> bool:
        """Gets a file of this folder that another host may have kept; one that is here is replaced. False where there
        is none."""
        if self.artifacts is None:
            return False
        try:
            return self.artifacts.get(path.relative_to(self.path).as_posix(), path)
        except OSError as error:
            log.warning("%s", error)
            return False

    def forget(self, path: Path) -> None:
        """Removes a file of this folder, here and where other hosts find it."""
        if self.artifacts is not None:
            self.artifacts.remove(path.relative_to(self.path).as_posix())
        path.unlink(missing_ok=True)

    def lock(self, name: str) -> FileLock:
        return FileLock(self.path / f"{name}.lock")


@lru_cache(maxsize=16)
def _artifacts(config: Path, changed: int) -> Artifacts | None:
    """The artifacts of the run that a file configures; `changed` is when it was written."""
    data = read_yaml(config)
    if not data.get("artifacts"):
        return None
    from mergesearch.search.artifacts import Artifacts, store_of  # loads the clouds' libraries, where they are there

    return Artifacts(store_of(data["artifacts"]), data["name"])


def _is_foreign(name: str) -> bool:
    """Whether a file is none that a worker leaves before it writes the configuration."""
    return not name.endswith(".lock") and not name.startswith(f".{CONFIG}.")


def check_same(ours: Config, theirs: Config, where: str) -> None:
    """`UserError` unless two configurations can share a run: they may differ in budget and machine only."""
    differences = ours.differences(theirs)
    if differences:
        raise UserError(
            f"{where} holds a run of another configuration ({'; '.join(differences[:3])}): set output and name to new "
            "ones, or take the change back"
        )


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    with leftovers.writing(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- the study ----------------------------------------------------------------------------------------------------


class NoStudy(UserError):
    """The storage is there, and the run has not begun in it."""


def check_storage(config: Config, folder: RunFolder) -> None:
    """Looks at where the study is to be kept, before anything is written.

    Raises:
        UserError: no study can be there, or it was there and is lost.
    """
    if config.storage:
        checked(config.storage)
    elif folder.scored and not _has_content(folder.database):
        raise _lost(folder, f"{folder.database} is {'empty' if folder.database.is_file() else 'not there'}")


def _lost(folder: RunFolder, what: str) -> UserError:
    return UserError(
        f"{what}, and {folder.scores} has the scores of {folder.scored} trials: put a copy of the study back, or set "
        "output and name to new ones to begin again"
    )


def open_storage(config: Config, folder: RunFolder, patience: Patience | None = None) -> optuna.storages.BaseStorage:
    """Where a run's study is kept.

    Args:
        patience: how long it is asked again where it does not answer, now and later.

    Raises:
        UserError: it cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    location = _location(config, folder)

    def open_it() -> optuna.storages.BaseStorage:
        if config.storage_proxy:
            return proxied(config.storage_proxy)
        return opened(checked(location.url)) if config.storage else _local_storage(location.url)

    try:
        storage = asked_again(open_it, location, patience or Patience())
    except UserError:
        raise
    except (StorageError, Exception) as error:
        raise refused(location, error.__cause__ or error) from None
    # turns are taken in the database itself, by a connection that is there for as long as one lasts
    engine = sqlalchemy.create_engine(checked(location.url), poolclass=NullPool) if config.storage_proxy else None
    return patient(storage, location, patience, engine)


def open_study(
    config: Config, folder: RunFolder, create: bool = True, storage: optuna.storages.BaseStorage | None = None
) -> optuna.Study:
    """The study of a run.

    Args:
        create: whether to begin it where it is not there.
        storage: where it is kept, if that is open already.

    Raises:
        UserError: the storage cannot be reached, holds no such study, or holds one of another configuration or of
            another version.
        StorageError: it fails while it is read.
    """
    where, storage = _location(config, folder), storage or open_storage(config, folder)
    try:
        if create:
            study = optuna.create_study(
                study_name=config.name, storage=storage, directions=_directions(config), load_if_exists=True
            )
        else:
            study = optuna.load_study(study_name=config.name, storage=storage)
    except KeyError:
        raise NoStudy(f"{where} holds no study {config.name!r}: start it with `mergesearch run`") from None
    if noted(study, "config") is not None:
        form = noted(study, "format")
        if form != FORMAT:
            version = "mergesearch 0.1" if form is None else f"another version of mergesearch (format {form})"
            raise UserError(
                f"{where} holds a run of {version}, whose trials this version does not read: set output and name "
                "to new ones, or go on with that version"
            )
        check_same(config, Config.model_validate(noted(study, "config")), str(where))
        if create and noted(study, "config")["storage"] != config.dump()["storage"]:
            note(study, "config", config.dump())  # an earlier version kept its password
    elif create:
        note(study, "format", FORMAT)
        note(study, "config", config.dump())
    return study


def open_stage(study: optuna.Study, storage: optuna.storages.BaseStorage, label: str) -> optuna.Study:
    """The study of one stage: the trials of one fixed space alone, for samplers that know no other.

    It stands beside the run's own in the same storage, and holds copies of trials that the run has.
    """
    return optuna.create_study(
        study_name=f"{study.study_name}/{label}", storage=storage, directions=study.directions, load_if_exists=True
    )


def note(study: optuna.Study, key: str, value: Any) -> None:
    """Notes something of the whole run, plain data, that every worker and every start reads."""
    study.set_user_attr(key, value)


def note_at_once(study: optuna.Study, key: str, value: Any) -> None:
    """The same for what is worth nothing later: a storage that fails is not asked again."""
    at_once(study._storage).set_study_user_attr(study._study_id, key, value)


def all_noted(study: optuna.Study) -> dict[str, Any]:
    """Everything that was noted, by its key."""
    return study.user_attrs


def noted(study: optuna.Study, key: str) -> Any:
    """What was noted under a key; None where nothing was."""
    return study.user_attrs.get(key)


def has_note(study: optuna.Study, key: str) -> bool:
    """Whether anything was noted under a key, also None."""
    return key in study.user_attrs


def note_ended(study: optuna.Study, trials: int) -> bool:
    """Notes that a run has come to an end with so many trials; whether nobody had."""
    if noted(study, _ENDED) == trials:
        return False
    note(study, _ENDED, trials)
    return True


def objective_of(study: optuna.Study) -> Objective | None:
    """The objective, once the parents' scores have fixed its scale."""
    data = noted(study, "objective")
    return Objective.from_data(data) if data else None


def begun(config: Config, say: Callable[[str], None] | None = None) -> optuna.Study | None:
    """The study of a run that has begun; None where there is none.

    A server that does not answer for a moment is waited for where there is a run folder already: a worker may be
    started again while it restarts.

    Args:
        say: told that it is waited for; without it nothing is.

    Raises:
        UserError: it cannot be read, or is of another configuration or version.
    """
    folder = RunFolder(config.folder)
    check_storage(config, folder)
    file = file_of(config.storage) if config.storage else folder.database
    if file is not None and not _has_content(file):  # opened, it would be written
        return None
    patience = Patience(OPENING, say) if say is not None and (folder.path / CONFIG).is_file() else None
    try:
        return open_study(config, folder, create=False, storage=open_storage(config, folder, patience))
    except NoStudy as error:
        if folder.scored:
            raise _lost(folder, str(error).partition(":" + " start")[0]) from None
        return None


def look_up(config: Config, key: str) -> Any:
    """What the run of a configuration's name and folder noted under a key, also where it is of another configuration;
    None where it noted nothing, or has not begun. For whoever does not need a run.

    Raises:
        UserError: its storage cannot be read.
    """
    folder = RunFolder(config.folder)
    file = file_of(config.storage) if config.storage else folder.database
    if file is not None and not _has_content(file):
        return None
    try:
        study = optuna.load_study(study_name=config.name, storage=open_storage(config, folder))
        return noted(study, key)
    except KeyError:
        return None
    except StorageError as error:
        raise UserError(str(error)) from None


def open_run(path: str | Path) -> tuple[Config, optuna.Study]:
    """The configuration and the study of a run folder.

    Raises:
        UserError: it is no run folder, or its storage cannot be read.
    """
    folder = RunFolder.open(path)
    config = folder.config().model_copy(update={"storage_proxy": None})  # its proxy may be closed by now
    check_storage(config, folder)
    if not config.storage and not _has_content(folder.database):
        raise UserError(f"{path} has no study.db yet: start the run with `mergesearch run`")
    if not config.storage and not _is_writable(folder.database):
        return config, open_study(config, folder, create=False, storage=_storage_of_copy(folder.database))
    return config, open_study(config, folder, create=False)


def _is_writable(file: Path) -> bool:
    """Whether SQLite can open a database: with a write-ahead log, a reader writes beside it as well."""
    # as whoever this process works as, where the system can say that
    effective = os.access in os.supports_effective_ids
    return all(os.access(path, os.W_OK, effective_ids=effective) for path in (file, file.parent))


def _storage_of_copy(file: Path) -> optuna.storages.BaseStorage:
    """A database that may only be read, by way of a copy, which is there as long as the storage is.

    Raises:
        UserError: it cannot be copied or opened.
    """
    log = file.with_name(f"{file.name}-wal")
    copies = tempfile.TemporaryDirectory(prefix="mergesearch-")
    location = Location(f"sqlite:///{copies.name}/{file.name}", file)
    try:
        for _ in range(_COPIES):  # a worker of somebody else may be writing
            before = [_state(path) for path in (file, log)]
            for path in (file, log):
                if path.exists():
                    shutil.copyfile(path, Path(copies.name) / path.name)
            if before == [_state(path) for path in (file, log)]:
                break
        storage = _local_storage(location.url)
    except Exception as error:
        raise refused(location, error) from None
    weakref.finalize(storage, copies.cleanup)
    return patient(storage, location, None)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        there = path.stat()
    except FileNotFoundError:
        return None
    return there.st_size, there.st_mtime_ns


def _location(config: Config, folder: RunFolder) -> Location:
    if config.storage:
        return Location(config.storage, proxy=config.storage_proxy)
    return Location(f"sqlite:///{folder.database}", folder.database)


def _has_content(file: Path) -> bool:
    # what was written last may all be in the log beside it
    parts = (file, file.with_name(f"{file.name}-wal"))
    return any(part.is_file() and part.stat().st_size > 0 for part in parts)


def _directions(config: Config) -> list[optuna.study.StudyDirection]:
    return [optuna.study.StudyDirection.MAXIMIZE] * (len(config.tasks) if config.objective.pareto else 1)


def _local_storage(url: str) -> optuna.storages.BaseStorage:
    """SQLite with a write-ahead log: a commit waits for no disk (measured: a trial of 30 parameters costs 0.09 s, not
    0.58 s), and a killed process still loses nothing."""
    storage = optuna.storages.RDBStorage(url)

    def write_ahead(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", write_ahead)
    storage.engine.dispose()
    return storage


def write_documents(folder: RunFolder, documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Notes which documents the search and the holdout use, as `lm_eval --samples` takes them."""
    write_atomically(folder.path / DOCUMENTS, json.dumps(documents) + "\n")
