"""The files that trials leave, kept where hosts find them that share no disk: in one of Optuna's artifact stores.

A run's own folder stays where they are written and read. With `artifacts`, whatever was written there whole is put into
the store under its name in the run, and what is looked for and is not there is got from it. The name of an object is
STUDY/NAME, with the file's path in the run folder as NAME. Objects in S3 and GCS are written whole or not at all; in a
folder the file takes its name at the end.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore, GCSArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from mergesearch import leftovers
from mergesearch.errors import UserError

log: logging.Logger = logging.getLogger(__name__)

S3, GCS = "s3://", "gs://"
# seconds before a store that fails is asked again
WAITS = (0.5, 2.0, 8.0)
T = TypeVar("T")


class Store(Protocol):
    """An artifact store, as Optuna defines it."""

    def open_reader(self, artifact_id: str) -> BinaryIO: ...
    def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...
    def remove(self, artifact_id: str) -> None: ...


class Folder(FileSystemArtifactStore):
    """Optuna's store in a folder, with files that are written whole or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Writes a file; a reader sees the old one or the new one."""
        path = self._get_filepath(artifact_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        with leftovers.writing(path) as partial, partial.open("wb") as file:
            shutil.copyfileobj(content_body, file)


class Prefixed:
    """A store in which all names begin alike, as `s3://BUCKET/PREFIX` says."""

    def __init__(self, store: Store, prefix: str):
        self._store, self._prefix = store, f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self._store.open_reader(self._prefix + artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._store.write(self._prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        self._store.remove(self._prefix + artifact_id)


@cache
def store_of(url: str) -> Store:
    """The store that `artifacts` names.

    Args:
        url: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, or a folder.

    Raises:
        UserError: a library that it needs is not installed, or it cannot be reached for want of a region or of
            credentials.
    """
    for scheme, kind, extra in ((S3, Boto3ArtifactStore, "s3"), (GCS, GCSArtifactStore, "gcs")):
        if not url.startswith(scheme):
            continue
        bucket, _, prefix = url.removeprefix(scheme).partition("/")
        try:
            return Prefixed(kind(bucket), prefix)
        except ImportError:
            raise UserError(
                f"artifacts {url} needs a library that is not installed: run `pip install 'mergesearch[{extra}]'`"
            ) from None
        except Exception as error:  # whatever the library makes of missing credentials
            raise UserError(
                f"artifacts {url} cannot be opened ({_short(error)}): set the credentials that its command line goes "
                "by, or name a folder that all hosts share"
            ) from None
    return Folder(url)


class Artifacts:
    """The store of one run.

    Args:
        store: where to.
        study: the run's name, by which its files are told from another's there.
        wait: what waits so many seconds.
    """

    def __init__(self, store: Store, study: str, wait: Callable[[float], Any] = time.sleep):
        self._store, self._study, self._wait = store, study, wait

    def put(self, name: str, path: Path) -> None:
        """Keeps a file under a name; one that is there is replaced.

        Raises:
            OSError: the store has failed again and again.
        """

        def write() -> None:
            with path.open("rb") as file:
                self._store.write(self._id(name), file)

        self._asked(name, write)

    def get(self, name: str, path: Path) -> bool:
        """Writes what is kept under a name to a file, whole or not at all. False where nothing is kept.

        Raises:
            OSError: the store has failed again and again.
        """

        def read() -> bool:
            try:
                source = self._store.open_reader(self._id(name))
            except ArtifactNotFound:
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, leftovers.writing(path) as partial, partial.open("wb") as file:
                shutil.copyfileobj(source, file)
            return True

        return self._asked(name, read)

    def remove(self, name: str) -> None:
        """Forgets what is kept under a name, if anything is; a store that fails keeps it."""
        try:
            self._store.remove(self._id(name))
        except Exception:  # nobody asks for it any more
            log.debug("%s was not removed", name, exc_info=True)

    def _id(self, name: str) -> str:
        return f"{self._study}/{name}"

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        for seconds in (*WAITS, None):
            try:
                return ask()
            except Exception as error:  # each library has its own
                if seconds is None or isinstance(error, FileNotFoundError | PermissionError):
                    number = error.errno if isinstance(error, OSError) and error.errno else 5  # EIO
                    raise OSError(number, _short(error), f"artifact {self._id(name)}") from error
                log.debug("%s: asked again", name, exc_info=True)
                self._wait(seconds)
        raise AssertionError("the last attempt returns or raises")


def check(url: str, study: str) -> None:
    """Looks whether a store answers, before anything is loaded.

    Raises:
        UserError: it does not, with the reason.
    """
    try:
        store_of(url).open_reader(f"{study}/config.yaml").close()
    except (ArtifactNotFound, FileNotFoundError):
        return
    except UserError:
        raise
    except Exception as error:  # each library has its own
        raise UserError(
            f"artifacts {url} does not answer ({_short(error)}): check its name and your access to it, or leave "
            "artifacts out where all hosts share the run folder"
        ) from None


def _short(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


__all__ = ["Artifacts", "Folder", "Prefixed", "check", "store_of"]
