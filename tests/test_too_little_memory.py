"""No memory left at the start: a sentence that says so, and no advice to fetch a whole file again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import QUICKSTART, mergesearch

from mergesearch import memory
from mergesearch.errors import UserError

HUGE = 2**50


def _caught(call: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_every_library_is_understood() -> None:
    """What they really raise."""
    assert memory.ran_out(_caught(lambda: torch.empty(HUGE)))
    assert memory.ran_out(_caught(lambda: np.ones(HUGE)))
    assert memory.ran_out(_caught(lambda: bytearray(HUGE * 2**9)))
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert memory.ran_out(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert memory.ran_out(ImportError("libtorch_cpu.so: failed to map segment from shared object"))


def test_what_it_was_raised_from_counts() -> None:
    def wrapped() -> None:
        try:
            torch.empty(HUGE)
        except RuntimeError as error:
            raise ValueError("the model cannot be built") from error

    assert memory.ran_out(_caught(wrapped)) and not memory.ran_out(ValueError("a damaged file"))


@pytest.mark.parametrize("where", ["safetensors.safe_open", "transformers.AutoModelForCausalLM.from_pretrained"])
def test_parents_that_have_no_room(where: str, tiny_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    pool = tiny_pool()
    monkeypatch.setattr(where, full)
    with pytest.raises(
        UserError, match=r"^base_model: \S+ does not fit into memory \([\d.]+ GiB are free .*: end other"
    ):
        pool.load()


def test_tensors_that_have_no_room(tiny_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesearch.checkpoints import checks

    pool = tiny_pool()
    monkeypatch.setattr(checks, "numbers", lambda *_: torch.empty(HUGE))
    with pytest.raises(UserError, match=r"^a pool of the base and 2 models does not fit into memory \("):
        pool.load()


def test_anywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergesearch.commands import methods

    monkeypatch.setattr(methods, "lines_of", lambda _: np.ones(HUGE))
    done = mergesearch("methods")
    assert done.status == 1 and done.err.startswith("error: what this command needs does not fit into memory (")
    assert "ndarray" not in done.err and done.err.count("\n") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not hold a process to the limit")
@pytest.mark.parametrize("megabytes", [250, 600, 800])
def test_a_process_that_may_have_no_more(megabytes: int) -> None:
    """Too little for the libraries themselves: to import them fails in many ways, and to say so may as well."""
    command = f'ulimit -v {megabytes * 1024}; exec "$0" -m mergesearch check "$1"'
    # with many threads their stacks alone may take it all, where the C library ends the process with a line of its own
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, QUICKSTART],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    if done.stderr.endswith("ABORT\n"):
        pytest.skip("the C library ended the process with a line of its own")
    assert done.returncode == 1, done.stderr
    assert "does not fit into memory" in done.stderr and done.stderr.count("\n") == 1, done.stderr
