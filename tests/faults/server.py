"""A process that has everything imported and runs each command in a fork of itself.

`Server` is what tests hold; `python -m faults.server` is the process. A request is one line of JSON, and so is the
answer. A fork may kill itself at any call and nothing else is hurt.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergesearch.commands.watching import UNWATCHED

ROOT = Path(__file__).parents[2]
# after which a command counts as hanging; no case takes more than a few on an idle machine
SECONDS = 240.0
HUNG = "hung"
READY = "ready"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: the exit status, negative for a signal, `hung` where it was killed for taking too long.
        out, err: what it printed.
        calls: every call that could have been made to fail, in order, if they were asked for.
        fired: whether the fault came to pass.
        state: what the run holds at the end, if that was asked for.
    """

    status: int | str
    out: str
    err: str
    calls: list[str] = field(default_factory=list)
    fired: bool = False
    state: dict[str, Any] | None = None


class Server:
    """Starts the process and asks it."""

    def __init__(self, folder: Path):
        self.folder = folder
        variables = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            UNWATCHED: "1",  # what is tried is what a dead process leaves, and the calls are counted in it
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **variables},
            text=True,
            start_new_session=True,
        )
        said = self._line()
        assert said == READY, said

    def run(
        self,
        *argv: object,
        fault: Mapping[str, Any] | None = None,
        count: Path | None = None,
        roots: Sequence[Path] = (),
        limits: Mapping[str, int] | None = None,
        state: Path | None = None,
        seconds: float = SECONDS,
    ) -> Ended:
        """Runs `mergesearch ARGV` in a fork.

        Args:
            fault: what is to fail, as `faults.injecting` takes it.
            count: whether to list the calls that could fail, for which any path is given.
            roots: the folders whose calls are counted and may fail.
            limits: of the operating system, by the names of `resource` without RLIMIT_; of memory (AS, bytes) and
                open files (NOFILE), how many more than there are already.
            state: a run folder to describe at the end.
            seconds: after which it is killed.
        """
        request = {
            "argv": [str(argument) for argument in argv],
            "fault": fault,
            "count": count is not None,
            "roots": [str(root) for root in roots],
            "limits": dict(limits or {}),
            "state": str(state) if state else None,
            "seconds": seconds,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._line()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        return line.strip()


# --- the process --------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Answers requests until there are no more."""
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0), "r")
    with open(os.devnull, "r+") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    _import(folder)
    print(READY, file=answers, flush=True)
    for line in requests:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _import(folder: Path) -> None:
    """Everything that any verb imports, by running each once."""
    import tqdm

    from faults import injecting, oracle, world  # noqa: F401 - forks need them all
    from mergesearch import cli
    from mergesearch.checkpoints import digests
    from mergesearch.search import worker

    worker.PATIENCE = 3.0  # a storage that is made to fail does not come back
    digests.SETTLED = -1.0  # else it would depend on the clock whether digests are remembered
    tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lack
    made = world.make(folder)
    config = made.write("warm.yaml", {**made.raced, "output": str(folder / "warm")})
    for argv in (
        ["check", config],
        ["run", config],
        ["report", folder / "warm"],
        ["table", folder / "warm"],
        ["export", folder / "warm", folder / "warm.mergekit.yaml", "--format", "mergekit"],
        ["score", made.path / "recipe.yaml", "--config", config],
        ["merge", made.path / "mergekit.yaml", folder / "warmed"],
    ):
        sys.argv = ["mergesearch", *map(str, argv)]
        status = cli.status()
        assert status == 0, argv


def _main(argv: list[str]) -> int:
    """The command as it is installed; its exit status."""
    from mergesearch import cli

    sys.argv = ["mergesearch", *argv]
    try:
        cli.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sys.stdout.flush()
        sys.stderr.flush()
        # pipes, as a limit on files is one on what is printed into them too
        pipes = {1: os.pipe(), 2: os.pipe()}
        child = os.fork()
        if not child:
            _child(request, folder, {stream: write for stream, (_, write) in pipes.items()})
        for _, write in pipes.values():
            os.close(write)
        told = {stream: _Told(read) for stream, (read, _) in pipes.items()}
        status = _wait(child, request["seconds"])
        found = folder / "found.json"
        return {
            "status": status,
            "out": told[1].text(),
            "err": told[2].text(),
            "fired": (folder / "fired").exists(),
            **(json.loads(found.read_text()) if found.exists() else {}),
        }


class _Told(threading.Thread):
    """Reads what a child prints until it and all that it started have ended, or it is no longer waited for."""

    def __init__(self, descriptor: int):
        super().__init__(daemon=True)
        self._descriptor, self._parts = descriptor, []
        self.start()

    def run(self) -> None:
        while part := os.read(self._descriptor, 1 << 16):
            self._parts.append(part)
        os.close(self._descriptor)

    def text(self) -> str:
        self.join(5.0)
        return b"".join(self._parts).decode(errors="replace")


def _child(request: Mapping[str, Any], folder: Path, pipes: Mapping[int, int]) -> None:
    """Runs the command, and never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, write in pipes.items():
            os.dup2(write, stream)
            os.close(write)
        from faults import injecting

        with injecting.injected(request["fault"], request["roots"], folder / "fired") as calls:
            for name, value in request["limits"].items():
                # of memory and files, so much more than there is already
                beside = {"AS": _mapped, "NOFILE": lambda: len(os.listdir("/proc/self/fd"))}.get(name, int)()
                hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (beside + value, hard))
            try:
                status = _main(request["argv"])
            except BaseException:  # as the interpreter would do
                traceback.print_exc()
                status = 1
            finally:
                for name in request["limits"]:
                    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
                    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (hard, hard))
        sys.stdout.flush()
        sys.stderr.flush()
        found: dict[str, Any] = {"calls": calls if request["count"] else []}
        if request["state"]:
            from faults import oracle

            found["state"] = oracle.state_of(Path(request["state"]))
        with contextlib.suppress(OSError):
            (folder / "found.json").write_text(json.dumps(found))
    finally:
        os._exit(status if isinstance(status, int) else 1)


def _mapped() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _wait(child: int, seconds: float) -> int | str:
    """The exit status of a child, which is killed with all it started once its time is over."""
    ends = time.monotonic() + seconds
    watched = os.pidfd_open(child)
    try:
        ended = select.select([watched], [], [], max(0.0, ends - time.monotonic()))[0]
    finally:
        os.close(watched)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else HUNG


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
