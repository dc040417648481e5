"""`mergesearch proxy CONFIG`: one connection to a run's storage for all of its workers, by Optuna's gRPC proxy."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages._cached_storage import _CachedStorage

from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.search.storage import PINGS, Location, checked, file_of, opened, refused

log: logging.Logger = logging.getLogger(__name__)

# calls that are answered at a time; the database gets no more connections than these
THREADS = 32
_LONGEST_MESSAGE = -1  # without an end: a study of thousands of trials is one answer


class _Cache(_CachedStorage):
    """Optuna's cache before a database, which knows parameters only of trials that it has met itself: one that began
    before the proxy was started anew goes past it."""

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        with self._lock:
            known = trial_id in self._trial_id_to_study_id_and_number
        through = super() if known else self._backend
        through.set_trial_param(trial_id, param_name, param_value_internal, distribution)


@contextmanager
def serving(config: Config, host: str, port: int) -> Iterator[int]:
    """A context in which a run's storage is served; its value is the port.

    Args:
        config: of the run.
        host, port: where; port 0 takes a free one.

    Raises:
        UserError: the run's storage is no database on a server, or cannot be opened; gRPC is not installed; the port
            is taken.
    """
    try:
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.servicer import OptunaStorageProxyService
    except ImportError:
        raise UserError("a proxy needs gRPC, which is not installed: run `pip install 'mergesearch[proxy]'`") from None
    if config.storage is None or file_of(config.storage) is not None:
        raise UserError(
            "storage: a proxy stands before a database on a server: set it to one (postgresql://USER@HOST/NAME)"
        )
    location = Location(config.storage)
    try:
        storage = opened(
            _Cache(
                optuna.storages.RDBStorage(
                    checked(config.storage), engine_kwargs={"pool_pre_ping": True, "pool_size": THREADS}
                )
            )
        )
    except UserError:
        raise
    except Exception as error:  # whatever its driver raises
        raise refused(location, error) from None
    options = [(f"grpc.max_{way}_message_length", _LONGEST_MESSAGE) for way in ("send", "receive")]
    options.append(("grpc.http2.min_ping_interval_without_data_ms", PINGS // 2))
    # where the port is taken a second server would share it in silence
    server = grpc.server(ThreadPoolExecutor(THREADS), options=[*options, ("grpc.so_reuseport", 0)])
    api_pb2_grpc.add_StorageServiceServicer_to_server(OptunaStorageProxyService(storage), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise UserError(f"--port {port} of {host} cannot be had: choose another, or 0 for a free one") from None
    server.start()
    try:
        yield bound
    finally:
        server.stop(grace=1.0).wait()
        storage.remove_session()


def wait() -> None:
    """Returns never; a signal ends it."""
    threading.Event().wait()
