"""Fixtures that several test files share. Nothing here needs the network or a GPU."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # as many processes as cores, each with as many threads, wait for each other most of the time
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.tiny_models import TinyPool

# marks of tests that take minutes: they run where `-m` names them
LONG = {"slow": "takes minutes: pytest -m slow", "chaos": "the long form: pytest -m chaos"}


def pytest_configure() -> None:
    # a shell starts what is put behind an & with SIGINT ignored, and then no command under test would hear it
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what takes long unless `-m` names its mark."""
    for mark, reason in LONG.items():
        if mark not in config.getoption("markexpr"):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tiny_pool(tmp_path: Path) -> Callable[..., TinyPool]:
    """Writes a tiny base and models fine-tuned from it: `tiny_pool("gpt2", models=3, dtype="bfloat16")`.

    What it takes and returns: `make_pool` in tiny_models.py.
    """
    from support.tiny_models import make_pool

    def make(architecture: str = "llama", folder: str = "pool", **options: Any) -> TinyPool:
        return make_pool(tmp_path / folder, architecture, **options)

    return make
