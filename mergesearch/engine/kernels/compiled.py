"""Compiled programs: in C++ or Triton where they can be written in it, by torch.compile elsewhere, or not at all.

In the background or before the first use; kept on disk; done without where there is no compiler.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergesearch.engine.kernels import native
from mergesearch.engine.kernels.code import trace
from mergesearch.engine.kernels.program import Program
from mergesearch.engine.kernels.symbols import Unsupported

log = logging.getLogger(__name__)

When = Literal["never", "background", "now"]
# below this many parameters a candidate in blocks (up to 0.1 microseconds for a parameter) is done before the compiler,
# which takes about 0.7 seconds, once for each program and machine
WORTH_WAITING = 10_000_000
# below this many a candidate in blocks takes some hundredths of a second: not worth a compiler's time
WORTH_COMPILING = 500_000
# the size that a kernel is compiled at: enough for the compiler to use all threads, little enough to be done at once
_EXAMPLE = 2**20

Kernel = Callable[..., Tensor]


class Compiler:
    """Compiled kernels by program and dtypes.

    Args:
        when: "background": a kernel is compiled while candidates are made without it; "now": before its first use;
            "never".
        patience: how many seconds the end of the process may wait for a kernel being compiled.
    """

    def __init__(self, when: When = "background", patience: float = 60.0):
        self.when = when
        self._ready: dict[Any, Any] = {}
        self._jobs: queue.Queue[Any] = queue.Queue()
        self._worker: threading.Thread | None = None
        self._patience = patience
        self._stopped = False

    def batched(self, program: Program, out: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device) -> Any:
        """The kernel that makes a whole batch, or None: as yet, or for good."""
        key = ("batch", program.source, out, device.type, tuple(dtypes))
        return self._get(key, lambda: _batched(program, out, dtypes, device))

    def batches(self, program: Program, out: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
        """Whether there is, or will be, a kernel that makes a whole batch."""
        key = ("batch", program.source, out, device.type, tuple(dtypes))
        return self._ready.get(key, False) is not Unsupported

    def single(self, program: Program, out: Tensor, scalars: Tensor, keys: Tensor, arguments: Sequence[Tensor]) -> Any:
        """What torch.compile makes of a program for arguments like these, or None: as yet, or for good."""
        shape = out.ndim if program.rows else 1
        key = (program.source, shape, out.dtype, out.device, tuple(a.dtype for a in arguments))
        if self.when == "never" or key in self._ready:
            return self._get(key, lambda: None)
        example = _example(program, out, scalars, keys, arguments)
        return self._get(key, lambda: _compile(program, example))

    def wait(self) -> None:
        """Returns when everything asked for so far is compiled."""
        self._jobs.join()

    def _get(self, key: Any, make: Callable[[], Any]) -> Any:
        if self.when == "never":
            return None
        if key not in self._ready:
            self._ready[key] = None
            self._make(key, make) if self.when == "now" else self._later(key, make)
        found = self._ready[key]
        return None if found is Unsupported else found

    def _later(self, *work: Any) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="mergesearch-compiler", daemon=True)
            self._worker.start()
            atexit.register(self._stop)
        self._jobs.put(work)

    def _work(self) -> None:
        while not self._stopped:
            work = self._jobs.get()
            try:
                if work is not None and not self._stopped:
                    self._make(*work)
            finally:
                self._jobs.task_done()

    def _stop(self) -> None:
        # a thread inside the compiler must not meet the interpreter's end
        self._stopped = True
        self._jobs.put(None)
        if self._worker is not None:
            self._worker.join(self._patience)

    def _make(self, key: Any, make: Callable[[], Any]) -> None:
        try:
            self._ready[key] = make()
        except Unsupported:
            self._ready[key] = Unsupported
        except Exception as error:
            self.when = "never"
            reason = " ".join(str(error).split())[:200]
            log.warning("merging without compiled kernels, block by block: %s: %s", type(error).__name__, reason)


def _batched(program: Program, out: torch.dtype, dtypes: Sequence[torch.dtype], device: torch.device) -> Any:
    code = trace(program, dtypes)
    if device.type == "cpu":
        return native.Kernel(code, out)
    from mergesearch.engine.kernels import device as triton

    kernel = triton.Kernel(code, out)
    kernel.try_on(device)
    return kernel


def _example(program: Program, out: Tensor, *inputs: Any) -> tuple[Any, ...]:
    """Arguments like the given ones with a few elements, none of them the caller's memory."""
    scalars, keys, arguments = inputs
    if not program.rows:
        blank = [torch.zeros(_EXAMPLE, dtype=t.dtype, device=t.device) for t in (out, *arguments)]
    else:
        blank = [torch.zeros_like(t) for t in (out, *arguments)]
    return (blank[0], scalars.clone(), keys.clone(), *blank[1:])


def _compile(program: Program, example: tuple[Any, ...]) -> Kernel:
    keep_on_disk()
    options = {"cpp.dynamic_threads": True} if example[0].device.type == "cpu" else {}
    made = torch.compile(program.kernel, dynamic=True, fullgraph=True, options=options)
    with torch.no_grad():
        made(*example)
    return made


def keep_on_disk() -> None:
    """Lets torch keep compiled kernels where the next process finds them, unless the environment names a place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(native.folder() / "inductor"))


def compiled_here() -> dict[str, int]:
    """How many kernels this process compiled, and how many it found on disk."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return {
        "compiled": found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"] + native.counts["compiled"],
        "found": found["fxgraph_cache_hit"] + native.counts["found"],
    }
