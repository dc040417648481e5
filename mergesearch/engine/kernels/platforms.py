"""Where kernels are built: where they were tried, see `TRIED`.

A kernel is code that a compiler makes, and that it equals the plain definition bit for bit is tested, not promised by
every compiler: another one may contract a product and a sum, another processor flush small numbers to zero. So
elsewhere (macOS, Windows, arm64, clang, ROCm, other GPUs) torch's own operations run, block by block, and one line says
so. `MERGESEARCH_UNTRIED=1` builds there all the same; `pytest tests/test_kernels.py` then says whether they are right.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from mergesearch.engine.kernels.notices import Unavailable

# by kind of device; (9, 0) is the compute capability of the H100
TRIED: dict[str, dict[str, Any]] = {
    "cpu": {"system": "Linux", "machine": "x86_64", "compiler": "gcc"},
    "cuda": {"system": "Linux", "machine": "x86_64", "compiler": "Triton", "capability": (9, 0)},
}
_ALL_THE_SAME = "MERGESEARCH_UNTRIED=1 builds them all the same"


def require(device: torch.device) -> None:
    """Returns where kernels for a device were tried.

    Raises:
        Unavailable: it is another platform, and `MERGESEARCH_UNTRIED` is not set.
    """
    if _all_the_same():
        return
    if device.type not in TRIED:
        raise Unavailable(f"there are none for {device.type}")
    tried = TRIED[device.type]
    if (platform.system(), platform.machine()) != (tried["system"], tried["machine"]):
        raise Unavailable(
            f"they were tried on {tried['system']} {tried['machine']}, this is {platform.system()} "
            f"{platform.machine()}; {_ALL_THE_SAME}"
        )
    if device.type == "cuda":
        _require_capability(device, tried["capability"])


def _require_capability(device: torch.device, tried: object) -> None:
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != tried:
        raise Unavailable(f"on GPUs they were tried on the NVIDIA H100, this is {name}; {_ALL_THE_SAME}")


def require_compiler(command: str, version: str) -> None:
    """Returns where the C++ compiler that reports `version` was tried.

    Raises:
        Unavailable: it is another one than gcc, and `MERGESEARCH_UNTRIED` is not set.
    """
    if "Free Software Foundation" not in version and not _all_the_same():
        name = version.partition("\n")[0].strip() or "unknown"
        raise Unavailable(f"they were tried with gcc, {command} is {name}: install g++; {_ALL_THE_SAME}")


def _all_the_same() -> bool:
    return os.environ.get("MERGESEARCH_UNTRIED", "") not in ("", "0")
