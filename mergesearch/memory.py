"""How much memory is free, the one place that asks."""

from __future__ import annotations

import errno
from pathlib import Path
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
    return of_device(device)[0] + idle


def of_device(device: torch.device) -> tuple[int, int]:
    """What a CUDA device's driver has left, and all that it has, in bytes."""
    import torch

    return torch.cuda.mem_get_info(device)


def accelerators() -> list[torch.device]:
    """The CUDA devices that this process may use."""
    import torch

    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def free_on_host() -> int:
    """Bytes of the host's memory that this process can have now, without swapping: what the machine has left, or what
    its group of processes or its own limits leave of that."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_of_group(), *_of_limits()]))


def _of_group() -> list[int]:
    """What the limits of the process's control groups leave, files that are kept in memory apart."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on every system
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
        if controllers:
            root, limit, used = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (Path(root + path), *Path(root + path).parents):
            if folder.is_relative_to(root):
                left += _left_of(folder, limit, used)
    return left


def _left_of(folder: Path, limit: str, used: str) -> list[int]:
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max":
            return []
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        cached = int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))
        return [int(most) - int((folder / used).read_text(encoding="utf-8")) + cached]
    except (OSError, ValueError):
        return []


def _of_limits() -> list[int]:
    """What the limits of the process itself (`ulimit -v`, `ulimit -d`) leave."""
    try:
        import resource
    except ImportError:  # not on every system
        return []
    import psutil

    taken = {resource.RLIMIT_AS: "vms", resource.RLIMIT_DATA: "data"}
    limits = {limit: resource.getrlimit(limit)[0] for limit in taken}
    set_here = {limit: most for limit, most in limits.items() if most != resource.RLIM_INFINITY}
    if not set_here:
        return []
    held = psutil.Process().memory_info()
    return [most - getattr(held, taken[limit], 0) for limit, most in set_here.items()]
