"""What counts as free memory, and that one place asks."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from mergesearch import memory

PACKAGE = Path(memory.__file__).parent


@pytest.fixture
def host(monkeypatch):
    class Memory:
        available = 3 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)


def test_on_the_cpu_it_is_what_the_host_has_available(host):
    assert memory.free(torch.device("cpu")) == memory.free_on_host() == 3 * 2**30


def test_on_cuda_it_is_what_the_driver_has_and_what_torch_holds_unused(host, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    assert memory.free(torch.device("cuda", 0)) == 1050


@pytest.mark.parametrize("reading", ["virtual_memory", "mem_get_info"])
def test_nobody_else_asks(reading):
    asking = [path.name for path in PACKAGE.rglob("*.py") if reading in path.read_text(encoding="utf-8")]
    assert asking == ["memory.py"]
    assert reading in Path(memory.__file__).read_text(encoding="utf-8")
