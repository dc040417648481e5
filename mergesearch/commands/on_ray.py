"""`mergesearch run --ray`: one worker on each GPU of a Ray cluster, kept there by Ray until the search is over.

Ray decides where a worker is and starts it again elsewhere when its node is gone. All else is as on one host: a worker
is a process of `mergesearch worker`, a `Crew` of one watches it, and the storage is all that workers share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.commands.crew import AUTO, GRACE, Crew, Seat, check_workers, command_of
from mergesearch.config import Config
from mergesearch.config.storage import PASSWORD, variables
from mergesearch.errors import CandidateError, UserError
from mergesearch.search.storage import checked, file_of, password_of
from mergesearch.search.store import RunFolder

# seconds that a look at what a worker says waits for it
_LOOKS = 1.0
# seconds that a connection may take
_CONNECTING = 10.0
# seconds after which a worker that Ray finds no place for is told of, and is given up once the others are done
_PLACING, _PATIENCE = 30.0, 600.0


@dataclass(frozen=True)
class Order:
    """What a worker needs to begin on any node.

    Attributes:
        config: the configuration's text, its paths absolute.
        allow_changed: as for `mergesearch run`.
        device: for its configuration.
        environment: what its process finds beside the node's own, passwords among it.
        folder: the run's.
        module: what Python runs with the configuration's file, where that is not `mergesearch worker`.
    """

    config: str
    allow_changed: bool
    device: str
    environment: Mapping[str, str] = field(repr=False)
    folder: Path
    module: str | None = None

    def command(self, seat: Seat, file: Path) -> list[str]:
        """The command line of a worker at a seat."""
        if self.module is not None:
            return [sys.executable, "-m", self.module, str(file)]
        return command_of(seat, str(file), [], self.allow_changed)


@dataclass(frozen=True)
class Places:
    """The workers that there are to be, and the GPUs that each takes; 0 where candidates live on CPUs."""

    workers: int
    gpus: int


class Post:
    """One worker, wherever Ray puts it: an actor, whose calls come from several threads."""

    def __init__(self, index: int):
        self._index = index
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._over = threading.Event()
        self._at_work = threading.Lock()
        self._end: tuple[str, str] | None = None

    def work(self, order: Order) -> tuple[str, str]:
        """Is at work until nothing is left to do; returns how it ended: done, wrong (input), failed or stopped, and
        why."""
        with self._at_work:  # Ray may call again what it lost sight of for a moment
            if self._end is None:
                self._end = self._work(order)
            return self._end

    def _work(self, order: Order) -> tuple[str, str]:
        from mergesearch.search.presence import signs_of

        os.environ.update(order.environment)  # the storage is read here too
        with tempfile.TemporaryDirectory(prefix="mergesearch-") as folder:
            file = Path(folder) / "search.yaml"
            file.write_text(order.config, encoding="utf-8")
            seat = Seat(f"worker {self._index} on {_here()}", order.device, order.environment)
            crew = Crew(
                [seat],
                lambda seat: order.command(seat, file),
                self._lines.put,
                lambda: signs_of(order.folder),
                over=self._over,
            )
            try:
                crew.run()
            except UserError as error:
                return "wrong", str(error)
            except CandidateError as error:
                return "failed", str(error)
            except KeyboardInterrupt:
                return "stopped", ""
        return "done", ""

    def said(self) -> list[str]:
        """The lines since the last call; waits a moment for one."""
        lines: list[str] = []
        with contextlib.suppress(queue.Empty):
            lines.append(self._lines.get(timeout=_LOOKS))
            while True:
                lines.append(self._lines.get_nowait())
        return lines

    def stop(self) -> None:
        """Asks the worker to hand its trial back and end; `work` returns once it has."""
        self._over.set()


def _here() -> str:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    return socket.gethostname() + (f" GPU {gpus}" if gpus else "")


@dataclass
class _Remote:
    index: int
    post: Any
    work: Any
    said: Any
    answered: float  # when it last did
    placed: bool = False  # whether it ever did
    told: bool = False
    end: tuple[str, str] | None = None


def run(
    address: str,
    workers: str,
    config: Config,
    say: Callable[[str], None],
    allow_changed: bool = False,
) -> None:
    """Returns once every worker has ended, and at least one because there was nothing left to do.

    Args:
        address: of the cluster, `ray://HOST:PORT` or `HOST:PORT`; `auto` for the one that this host is in.
        workers: a number, or `auto`: one for each GPU of the cluster; without GPUs one for each node.
        config: of the run.
        say: told each line of a worker, and what became of it.
        allow_changed: go on with other weights or documents than the run was scored with.

    Raises:
        UserError: no cluster is there, it cannot hold the workers, or the input is wrong, as a worker said.
        CandidateError: no worker got to the end.
        KeyboardInterrupt: passed on, once the workers have handed back what they were at.
    """
    check_workers(workers)
    if config.storage:
        checked(config.storage)
    with _connected(address) as ray:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        _check_storage(config, {str(node["NodeManagerHostname"]) for node in nodes})
        places = places_in([node["Resources"] for node in nodes], workers, config.device)
        each = f", {places.gpus} GPU each" if places.gpus else ""
        say(f"{places.workers} workers on {len(nodes)} nodes of Ray{each}")
        order = order_for(config, places, allow_changed)
        actor = ray.remote(Post).options(
            num_cpus=1,
            num_gpus=places.gpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,
            scheduling_strategy="SPREAD",
        )
        crew = [_begin(actor.remote(index), index, order) for index in range(places.workers)]
        try:
            while any(worker.end is None for worker in crew):
                _look(ray, crew, say)
        except BaseException:
            _end(ray, crew, say)
            raise
    ends = [worker.end for worker in crew if worker.end is not None]
    if not any(how == "done" for how, _ in ends):
        raise CandidateError(ends[-1][1])
    RunFolder.prepare(config)  # hosts that share no folder have each their own, and none was at work here


def places_in(nodes: Sequence[Mapping[str, float]], workers: str, device: str) -> Places:
    """How many workers a cluster is to have, of what its nodes say they have.

    Raises:
        UserError: it cannot hold them.
    """
    gpus = [0 if device == "cpu" else int(node.get("GPU", 0)) for node in nodes]
    if not any(gpus):
        if device not in (AUTO, "cpu"):
            raise UserError(f"device {device} on a Ray cluster without GPUs: set device to cpu or auto")
        there = sum(int(node.get("CPU", 0)) for node in nodes)
        wanted = sum(node.get("CPU", 0) >= 1 for node in nodes) if workers == AUTO else int(workers)
        if not 1 <= wanted <= there:
            raise UserError(f"the Ray cluster has {there} CPUs, and each worker takes one: ask for fewer --workers")
        return Places(wanted, 0)
    if workers == AUTO:
        return Places(sum(gpus), 1)
    wanted = int(workers)
    each = max(1, sum(gpus) // wanted)
    while each > 1 and sum(there // each for there in gpus) < wanted:  # a worker's GPUs are all on one node
        each -= 1
    if sum(there // each for there in gpus) < wanted:
        raise UserError(f"--workers {workers}: the cluster has {sum(gpus)} GPUs, and a worker takes one: ask for fewer")
    return Places(wanted, each)


def order_for(config: Config, places: Places, allow_changed: bool) -> Order:
    """What the workers of a run are given."""
    device = config.device if not places.gpus else "cuda" if places.gpus == 1 else AUTO
    environment = {name: os.environ[name] for name in variables(config.storage or "") if name in os.environ}
    if config.storage and (password := password_of(config.storage)) is not None:
        environment[PASSWORD] = password
    folder = Path(config.folder).absolute()
    config = config.model_copy(update={"output": str(folder)})  # a node's own folder is another
    return Order(config.to_yaml(), allow_changed, device, environment, folder)


def _check_storage(config: Config, hosts: set[str]) -> None:
    """`UserError` where workers of several hosts would write one SQLite file."""
    if len(hosts) > 1 and (not config.storage or file_of(config.storage) is not None):
        raise UserError(
            f"the Ray cluster has {len(hosts)} hosts, and the run's storage is a SQLite file, which is safe for "
            "one: set storage to a database that all reach (postgresql://USER@HOST/NAME)"
        )


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, as a client of a cluster.

    Raises:
        UserError: it is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray, which is not installed: run `pip install 'mergesearch[ray]'`") from None
    _check_address(address)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise _unreachable(address, (str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    finally:
        for each, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(each, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """`UserError` where nobody listens at an address: Ray itself would ask there for minutes."""
    if address == AUTO:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--ray {address!r}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, getattr(error, "strerror", None) or str(error)) from None


def _unreachable(address: str, why: str) -> UserError:
    return UserError(
        f"--ray {address}: no Ray cluster can be reached ({why.rstrip('.')}): start one with `ray start --head`, or "
        "name its address"
    )


def _begin(post: Any, index: int, order: Order) -> _Remote:
    return _Remote(index, post, post.work.remote(order), post.said.remote(), time.monotonic())


def _look(ray: Any, crew: Sequence[_Remote], say: Callable[[str], None]) -> None:
    """Passes on what the workers say, and notes who has ended."""
    living = [worker for worker in crew if worker.end is None]
    ray.wait([ref for worker in living for ref in (worker.said, worker.work)], timeout=_LOOKS)
    # all that is there by now, not only the first
    ready, _ = ray.wait([r for w in living for r in (w.said, w.work)], num_returns=2 * len(living), timeout=0)
    now = time.monotonic()
    over = any(worker.end is not None and worker.end[0] == "done" for worker in crew)
    for worker in living:
        if worker.said in ready:
            _pass_on(ray, worker, say)
            worker.said, worker.answered, worker.placed = worker.post.said.remote(), now, True
        waited = now - worker.answered
        if worker.work in ready:
            how, why = worker.end = _ended(ray, worker.work)
            _pass_on(ray, worker, say)
            if how == "wrong":
                raise UserError(why)
            if how == "failed":
                say(f"note: worker {worker.index} is given up: {why}")
            ray.kill(worker.post)  # what it had is free for one whose node is gone
        elif waited <= _PLACING:
            worker.told = False
        elif not worker.told:
            worker.told = True
            say(f"note: worker {worker.index} has no place: its node is gone, or all of the cluster is taken")
        elif over and waited > _PATIENCE:
            worker.end = "failed", "no place was found for it"
            ray.kill(worker.post)


def _ended(ray: Any, work: Any) -> tuple[str, str]:
    """How a worker ended."""
    try:
        return ray.get(work)
    except ray.exceptions.RayError as error:  # say a node without mergesearch
        return "failed", str(error).strip().splitlines()[-1].strip()


def _pass_on(ray: Any, worker: _Remote, say: Callable[[str], None]) -> None:
    """Passes on what a worker has said; nothing where it is gone."""
    with contextlib.suppress(ray.exceptions.RayError):
        for line in ray.get(worker.said, timeout=2 * _LOOKS):
            say(line)


def _end(ray: Any, crew: Sequence[_Remote], say: Callable[[str], None]) -> None:
    """Asks every worker to end in order, and ends those that do not."""
    living = [worker for worker in crew if worker.end is None]
    there = [worker for worker in living if worker.placed]
    with contextlib.suppress(ray.exceptions.RayError):
        for worker in there:
            worker.post.stop.remote()
        if there:
            ray.wait([worker.work for worker in there], num_returns=len(there), timeout=GRACE + _LOOKS)
        for worker in there:
            _pass_on(ray, worker, say)
    for worker in living:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(worker.post)
