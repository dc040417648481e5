"""`mergesearch run` with several workers: one process for each device of this host, watched until the search is over.

The workers share the run's storage and nothing else, as workers anywhere do. This process starts them, passes their
lines on, starts one again that died, ends one that hangs, and decides nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone

from mergesearch.config import Config
from mergesearch.errors import CandidateError, UserError
from mergesearch.search.presence import SILENT, Sign
from mergesearch.search.trials import without_numbers

log: logging.Logger = logging.getLogger(__name__)

# in a worker's environment: it ends when whoever started it has
LEASH = "MERGESEARCH_LEASH"
# a worker that died so often for one reason within so many seconds is not started again
MOST_DEATHS, WITHIN = 3, 600.0
# seconds that workers have to end in order
GRACE = 20.0
_LAST_LINES = 2.0  # seconds for what a worker that has ended said last
_LOOKS = 0.2  # seconds between looks at who lives
_SIGNS = 30.0  # seconds between looks at their signs of life
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_WRONG_INPUT = 2
# the exit status of a worker that found that none can go on
RUN_OVER = 3
AUTO = "auto"
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Shares:
    """How the work of this host is shared out.

    Attributes:
        workers: how many.
        gpus: to be seen, where workers may choose.
        each: how many of them a candidate takes.
    """

    workers: int
    gpus: int = 0
    each: int = 1


def check_workers(workers: str) -> None:
    """`UserError` where --workers is neither a number that may be nor `auto`."""
    if workers != AUTO and not (workers.isdecimal() and 1 <= int(workers) <= MOST_WORKERS):
        raise UserError(f"--workers {workers!r}: give a number from 1 to {MOST_WORKERS}, or auto for one for each GPU")


def shares(workers: str, config: Config, needed: Callable[[Config], int] | None = None) -> Shares:
    """How many workers there are to be.

    Args:
        workers: a number, or `auto`: one for each GPU, or for as many as a candidate takes; one without.
        config: of the run.
        needed: how many GPUs a candidate takes; asked where there are several.

    Raises:
        UserError: it is neither, or the models cannot be merged.
    """
    check_workers(workers)
    device = config.device
    if workers == "1" or device != AUTO:
        return Shares(1 if workers == AUTO else int(workers))
    gpus = _gpus()
    each = (needed or _needed_elsewhere)(config) if gpus > 1 else 1
    return Shares(max(1, gpus // each) if workers == AUTO else int(workers), gpus, each)


def _gpus() -> int:
    """How many GPUs are to be seen.

    A process that has asked CUDA can use none in a fork of itself (`commands.watching` makes one), and where NVML is
    not to be had PyTorch asks CUDA how many there are. So a fork asks, and what that takes is freed with it.
    """
    import torch  # the command waits for nothing else of it

    if not hasattr(os, "fork") or not torch.backends.cuda.is_built() or torch.cuda.is_initialized():
        return torch.cuda.device_count()
    answer, told = os.pipe()
    if not (asks := fork()):
        try:
            os.write(told, str(torch.cuda.device_count()).encode())
        finally:
            os._exit(0)
    os.close(told)
    with open(answer, "rb") as read:
        found = read.read()
    os.waitpid(asks, 0)
    return int(found or b"0")


def fork() -> int:
    """`os.fork`, without the warning of a process with several threads: those of this command run nothing that a fork
    would wait for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def gpus_needed(config: Config) -> int:
    """How many of the GPUs that are to be seen a candidate is split over."""
    from mergesearch.commands.holding import holding_of, survey_of

    return len(holding_of(config, survey_of(config)).devices.every)


def _needed_elsewhere(config: Config) -> int:
    """The same, found in another process: to ask GPUs what is free takes some of it as long as the process lives."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        return other.submit(gpus_needed, config).result()


def command_of(seat: Seat, config: str, sets: Sequence[str], allow_changed: bool) -> list[str]:
    """The command line of one worker."""
    parts = [part for item in (*sets, f"device={seat.device}") for part in ("--set", item)]
    allowed = ["--allow-changed"] if allow_changed else []
    return [sys.executable, "-m", "mergesearch", "worker", config, *parts, *allowed]


@dataclass(frozen=True)
class Seat:
    """Where one worker is at work.

    Attributes:
        name: in front of its lines.
        device: for its configuration.
        environment: what its process finds beside ours.
    """

    name: str
    device: str
    environment: Mapping[str, str] = field(default_factory=dict)


def seats(share: Shares, device: str, environment: Mapping[str, str]) -> list[Seat]:
    """Where the workers are at work: spread over the GPUs that are to be seen, each seeing its own alone.

    Args:
        share: how many there are of each.
        device: of the configuration: `auto`, or the one device that all of them share.
        environment: ours.
    """
    workers, gpus = share.workers, share.gpus
    if device != AUTO or not gpus:
        return [Seat(f"worker {index}", device) for index in range(workers)]
    seen = environment.get(_VISIBLE)
    names = [name.strip() for name in seen.split(",")] if seen else [str(index) for index in range(gpus)]
    groups = [",".join(names[at : at + share.each]) for at in range(0, gpus - share.each + 1, share.each)]
    return [
        Seat(
            f"worker {index} on GPU {groups[index % len(groups)]}",
            "cuda" if share.each == 1 else AUTO,  # auto splits a candidate over what it sees
            {_VISIBLE: groups[index % len(groups)]},
        )
        for index in range(workers)
    ]


class Deaths:
    """How often a worker died, and of what: one that died too often for one reason is not started again.

    Args:
        name: of the worker, in what is said.
        clock: seconds that only grow.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic):
        self._name, self._clock = name, clock
        self._deaths: list[tuple[float, str]] = []
        self.too_many: bool = False

    @property
    def last(self) -> str:
        """The reason of the last one."""
        return self._deaths[-1][1]

    def one_more(self, reason: str) -> str:
        """Counts one, and returns what is to be said of it."""
        now = self._clock()
        self._deaths = [death for death in self._deaths if now - death[0] <= WITHIN] + [(now, reason)]
        alike = sum(1 for _, other in self._deaths if without_numbers(other) == without_numbers(reason))
        self.too_many = alike > MOST_DEATHS
        if self.too_many:
            return f"{self._name} ended {alike} times with {reason}, and is not started again"
        return f"{self._name} ended with {reason}: it is started again"


@dataclass
class _Worker:
    seat: Seat
    deaths: Deaths
    process: subprocess.Popen[str] | None = None
    listening: threading.Thread | None = None
    last: str = ""  # what it said last
    started: datetime | None = None
    beat: tuple[int, int] | None = None  # its number, and at how many looks in a row it has stood there
    done: bool = False
    given_up: bool = False

    @property
    def over(self) -> bool:
        return self.done or self.given_up


class Crew:
    """The workers of one host.

    Args:
        where: one seat for each.
        command: a worker's command line at a seat.
        say: told each line of a worker, and what became of it.
        signs: reads the last sign of life of every worker of the run; None while there is no run to read.
        clock: seconds that only grow.
        over: set by another thread where this one is to end as by Ctrl-C.
    """

    def __init__(
        self,
        where: Sequence[Seat],
        command: Callable[[Seat], Sequence[str]],
        say: Callable[[str], None],
        signs: Callable[[], Mapping[str, Sign]] = dict,
        clock: Callable[[], float] = time.monotonic,
        over: threading.Event | None = None,
    ):
        self._workers = [_Worker(seat, Deaths(seat.name, clock)) for seat in where]
        self._over = over or threading.Event()
        self._command, self._say, self._signs, self._clock = command, say, signs, clock
        self._lines: queue.SimpleQueue[tuple[_Worker, str]] = queue.SimpleQueue()
        self._looked = clock()
        # each would else take all cores
        self._threads = {"OMP_NUM_THREADS": str(max(1, _cores() // len(where)))} if len(where) > 1 else {}

    def run(self) -> None:
        """Returns once every worker has ended, and at least one because there was nothing left to do.

        Raises:
            UserError: the input is wrong, as a worker said.
            CandidateError: no worker got to the end, or one said that none can.
            KeyboardInterrupt: passed on, once the workers have handed back what they were at.
        """
        try:
            for worker in self._workers:
                self._start(worker)
            while not all(worker.over for worker in self._workers):
                self._pass_on()
                if self._over.is_set():
                    raise KeyboardInterrupt
                for worker in self._workers:
                    self._look(worker)
                self._look_for_hanging()
        except BaseException:
            self._end()
            raise
        self._pass_on(wait=False)
        if not any(worker.done for worker in self._workers):
            raise CandidateError(f"no worker is left: the last one ended with {self._workers[-1].deaths.last}")

    # --- one worker ---

    def _start(self, worker: _Worker) -> None:
        # a session of its own: Ctrl-C comes to this process, which then asks each worker to end, once
        worker.started = datetime.now(timezone.utc)
        worker.process = subprocess.Popen(
            self._command(worker.seat), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
            env={**self._threads, **os.environ, **worker.seat.environment, LEASH: "1"},
        )  # fmt: skip
        worker.beat = None
        worker.listening = threading.Thread(target=self._listen, args=(worker, worker.process), daemon=True)
        worker.listening.start()

    def _listen(self, worker: _Worker, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put((worker, line.rstrip("\n")))

    def _hear(self, worker: _Worker) -> None:
        """Passes on the last lines of a worker that has ended."""
        if worker.listening is not None:
            worker.listening.join(timeout=_LAST_LINES)  # a process of its own may hold the pipe open
        self._pass_on(wait=False)

    def _pass_on(self, wait: bool = True) -> None:
        """Prints what the workers have said; waits a moment for it."""
        while True:
            try:
                worker, line = self._lines.get(timeout=_LOOKS if wait else 0.0)
            except queue.Empty:
                return
            worker.last = line or worker.last
            self._say(f"{worker.seat.name}: {line}")
            wait = False

    def _look(self, worker: _Worker) -> None:
        """Starts a worker again that has died."""
        process = worker.process
        if worker.over or process is None or (status := process.poll()) is None:
            return
        self._hear(worker)
        if status == 0:
            worker.done = True
            return
        if status == _WRONG_INPUT:
            raise UserError(worker.last.removeprefix("error: "))
        if status == RUN_OVER:
            raise CandidateError(worker.last.removeprefix("error: "))
        reason = signal.Signals(-status).name if status < 0 else worker.last.removeprefix("error: ")
        self._say(f"note: {worker.deaths.one_more(reason)}")
        worker.given_up = worker.deaths.too_many
        if not worker.given_up:
            self._start(worker)

    def _look_for_hanging(self) -> None:
        """Kills a worker that lives and gives no sign of life; its trial is then anybody's."""
        now = self._clock()
        if now - self._looked < _SIGNS:
            return
        self._looked = now
        here = [sign for sign in self._signs().values() if sign.host == os.uname().nodename]
        for worker in self._workers:
            sign = next((sign for sign in here if _is_of(worker, sign)), None)
            if worker.over or worker.process is None:
                continue
            if sign is None or worker.beat is None or worker.beat[0] != sign.beat:
                # while nobody answers, nobody is silent
                worker.beat = None if sign is None else (sign.beat, 0)
                continue
            worker.beat = sign.beat, worker.beat[1] + 1
            if worker.beat[1] * _SIGNS >= SILENT and not sign.ended:
                self._say(f"note: {worker.seat.name} has given no sign of life for {SILENT:.0f} s: it is ended")
                worker.process.kill()

    def _end(self) -> None:
        """Asks every worker to end in order, and ends those that do not."""
        living = [w.process for w in self._workers if w.process is not None and w.process.poll() is None]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in living:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for worker in self._workers:
            self._hear(worker)


def _cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_of(worker: _Worker, sign: Sign) -> bool:
    """Whether a sign is of a worker's process, and not of one that had its number before."""
    if worker.process is None or worker.started is None:
        return False
    return sign.pid == worker.process.pid and sign.began >= worker.started


def hold_leash(environment: Mapping[str, str]) -> None:
    """In a worker: ends it, as a signal would, when whoever started it is gone without a word."""
    if not environment.get(LEASH):
        return

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="leash").start()
