"""When kernels are built: in C++ for the CPU, in Triton for CUDA devices, in the background or before their first use.

A program that neither language can express, and a kernel that fails to build, leave their own tensors to torch's
operations, block by block; the other kernels are not touched by it.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from mergesearch.engine.kernels import built, native, platforms
from mergesearch.engine.kernels.code import trace
from mergesearch.engine.kernels.launch import Kernel
from mergesearch.engine.kernels.notices import Unavailable, once, without_kernels
from mergesearch.engine.kernels.program import Program
from mergesearch.engine.kernels.symbols import Unsupported

log: logging.Logger = logging.getLogger(__name__)

When = Literal["never", "background", "now"]
# below this many parameters a candidate in blocks (up to 0.1 microseconds for a parameter) is done before the compiler,
# which takes about 0.7 seconds, once for each program and machine
WORTH_WAITING = 10_000_000
# below this many a candidate in blocks takes some hundredths of a second: not worth a compiler's time
WORTH_COMPILING = 500_000


class Compiler:
    """Built kernels by program and dtypes.

    Attributes:
        failed: why a kernel could not be built, by what it is a kernel of; those that no language can express are no
            failures.

    Args:
        when: "background": a kernel is built while candidates are made without it; "now": before its first use;
            "never".
        patience: how many seconds the end of the process may wait for a kernel being built.
    """

    def __init__(self, when: When = "background", patience: float = 60.0):
        self.when = when
        # asked for: those that cannot be had included; built: those that are ready
        self._asked: set[Any] = set()
        self._built: dict[Any, Kernel] = {}
        self.failed: dict[Any, str] = {}
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._worker: threading.Thread | None = None
        self._patience = patience
        self._stopped = False

    def kernel(
        self, program: Program, out: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device
    ) -> Kernel | None:
        """The kernel of a program whose arguments are held in `dtypes` and its result in `out`; None: as yet, or for
        good."""
        if self.when == "never":
            return None
        key = (program.source, out, device.type, tuple(dtypes))
        if key not in self._asked:
            self._asked.add(key)
            self._order(key, lambda: _build(program, out, dtypes, device))
        return self._built.get(key)

    def wait(self) -> None:
        """Returns when everything asked for so far is built."""
        self._jobs.join()

    def _order(self, key: Any, build: Callable[[], Kernel]) -> None:
        if self.when == "now":
            self._try(key, build)
            return
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="mergesearch-compiler", daemon=True)
            self._worker.start()
            atexit.register(self._stop)
        self._jobs.put((key, build))

    def _work(self) -> None:
        while not self._stopped:
            job = self._jobs.get()
            try:
                if job is not None and not self._stopped:
                    self._try(*job)
            finally:
                self._jobs.task_done()

    def _stop(self) -> None:
        # a thread inside the compiler must not meet the interpreter's end
        self._stopped = True
        self._jobs.put(None)
        if self._worker is not None:
            self._worker.join(self._patience)

    def _try(self, key: Any, build: Callable[[], Kernel]) -> None:
        try:
            self._built[key] = build()
        except Unsupported:
            pass  # no language has all of its operations
        except Unavailable as error:
            self.failed[key] = str(error)
            without_kernels(log, error)
        except Exception as error:
            self.failed[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            name = hashlib.blake2b(repr(key).encode(), digest_size=4).hexdigest()
            once(
                log,
                f"kernel {name} could not be built, its tensors are merged by torch's own operations: "
                f"{self.failed[key]}",
            )


def _build(program: Program, out: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device) -> Kernel:
    platforms.require(device)
    code = trace(program, dtypes)
    if device.type == "cpu":
        return native.CppKernel(code, out)
    from mergesearch.engine.kernels import device as triton

    kernel = triton.TritonKernel(code, out)
    kernel.try_on(device)
    return kernel


def compiled_here() -> dict[str, int]:
    """How many libraries this process compiled, and how many it found on disk."""
    return {what: built.counts[what] for what in ("compiled", "found")}
