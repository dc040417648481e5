"""How much memory is free, the one place that asks."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# how the system, Python's libraries and their compilers' libraries say that there is none left
_SAID = (
    "cannot allocate memory", "can't allocate memory", "unable to allocate", "failed to allocate", "not enough memory",
    "out of memory", "failed to map segment", "bad_alloc", "memory allocation", "can't start new thread", "os error 12",
)  # fmt: skip


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that there is no memory left."""
    while error is not None:
        said = str(error).lower()
        if isinstance(error, MemoryError) or any(words in said for words in _SAID):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def too_little(what: str) -> str:
    """The sentence on what has no room."""
    try:
        left = f"{free_on_host() / 2**30:.1f} GiB are free on this machine{_limited()}"
    except Exception:  # to find out takes memory as well
        left = "this process may have no more"
    return (
        f"{what} does not fit into memory ({left}): end other programs or raise the limit, use fewer or smaller "
        "models, or a machine with more"
    )


def _limited() -> str:
    """What the shell's own limit leaves of it, where there is one."""
    try:
        import resource
    except ImportError:  # not on every system
        return ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        "" if limit == resource.RLIM_INFINITY else f", and this process may have {limit / 2**30:.1f} GiB by its limit"
    )


def free(device: torch.device) -> int:
    """Bytes that can be had on a device now, without swapping.

    On a CUDA device what its driver has left, and what torch holds there and does not use; on every other device what
    the host has available.
    """
    if device.type != "cuda":
        return free_on_host()
    import torch

    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def free_on_host() -> int:
    """Bytes of the host's memory that can be had now, without swapping."""
    import psutil

    return psutil.virtual_memory().available
