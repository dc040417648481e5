"""Makes one call fail: a file's, the storage's or the model's, anywhere in a command.

A call is named `OP PATH`: the operation and what it is about, with numbers blotted out. A fault names a call, which of
its occurrences, and how it fails. Nothing here is imported by the package: the hooks are put in place in a fork.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import re
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WRITES = ("create", "write", "rename", "mkdir", "remove", "rmdir", "save")
READS = ("read", "stat", "list", "load")
LOCK, STORAGE, MODEL = "lock", ("execute", "commit"), ("forward", "build")

# the ways in which a call of each kind can fail; what a full disk does lasts, the others come once
FULL, BROKEN, DENIED, SHORT, TORN, KILL, TERM, INTERRUPT = (
    "full",
    "broken",
    "denied",
    "short",
    "torn",
    "kill",
    "term",
    "interrupt",
)
RAISES, MEMORY, NAN, BUSY, HALTED = "raises", "memory", "nan", "busy", "halted"
# not the call fails, but another file is cut to half its size at that moment
CUT = "cut"
WAYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(WRITES, (FULL, BROKEN, DENIED, KILL, TERM)),
    # no removal needs room
    **dict.fromkeys(("remove", "rmdir"), (BROKEN, DENIED, KILL, TERM)),
    "write": (FULL, BROKEN, SHORT, TORN, INTERRUPT),
    **dict.fromkeys(READS, (BROKEN, DENIED, KILL)),
    LOCK: (BROKEN, KILL),
    "execute": (FULL, BROKEN, BUSY, HALTED, KILL, TERM),
    "commit": (FULL, BROKEN, BUSY, HALTED, KILL, TERM),
    "forward": (RAISES, MEMORY, NAN, KILL, TERM, INTERRUPT),
    "build": (RAISES, MEMORY, KILL),
}
_SQLITE = {
    FULL: "database or disk is full",
    BROKEN: "disk I/O error",
    BUSY: "database is locked",
    HALTED: "disk I/O error",
}
_ERRNO = {FULL: errno.ENOSPC, SHORT: errno.ENOSPC, BROKEN: errno.EIO, DENIED: errno.EACCES}
_LASTING = (FULL, SHORT, HALTED)
_SIGNALS = {KILL: signal.SIGKILL, TORN: signal.SIGKILL, TERM: signal.SIGTERM, INTERRUPT: signal.SIGINT}


class Injector:
    """Counts calls, and makes the chosen one fail."""

    def __init__(self, fault: Mapping[str, Any] | None, roots: Sequence[str], fired: Path):
        self._fault, self._roots, self._mark = fault, roots, fired
        self.calls: list[str] = []
        self._seen: Counter[str] = Counter()
        self._lasting = False

    def path(self, path: Any) -> str | None:
        """A path as it stands in a call's name; None outside the roots."""
        try:
            name = os.path.abspath(os.fsdecode(path))
            if name.startswith("/proc/self/fd/"):
                name = os.readlink(name)
        except (TypeError, ValueError, OSError):
            return None
        for root in self._roots:
            if name == root or name.startswith(root + os.sep):
                return _blotted(os.path.relpath(name, os.path.dirname(root)))
        return None

    def call(self, op: str, about: str | None, half: Callable[[], object] | None = None) -> str | None:
        """Raises, or kills, where this call is to fail; else returns how its result is to be spoilt, mostly not at all.

        Args:
            half: does the first half of what the call would do.
        """
        if about is None:
            return None
        name = f"{op} {about}"
        self.calls.append(name)
        self._seen[name] += 1
        if self._fault is None:
            return None
        how = self._fault["how"]
        if self._lasting and (op in WRITES if op not in STORAGE else True) and op not in ("remove", "rmdir"):
            self._fail(op, how, about)
        if name != self._fault["call"] or self._seen[name] != self._fault["occurrence"]:
            return None
        with _original["open"](self._mark, "w"):
            pass
        if how == CUT:
            victim = self._fault["victim"]
            os.truncate(victim, os.path.getsize(victim) // 2)
            return None
        self._lasting = how in _LASTING
        if half is not None and how in (SHORT, TORN):
            half()
        return self._fail(op, how, about)

    def _fail(self, op: str, how: str, about: str) -> str | None:
        if how in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[how])
            return None
        if op in STORAGE:
            raise sqlite3.OperationalError(_SQLITE.get(how, "disk I/O error"))
        if op in MODEL:
            if how == NAN:
                return NAN
            raise MemoryError("injected") if how == MEMORY else RuntimeError("injected")
        number = _ERRNO.get(how, errno.ENOSPC)
        raise OSError(number, os.strerror(number), about)


def _blotted(path: str) -> str:
    path = re.sub(r"\.partial-\d+-[0-9a-f]{8}@[^/]*", ".partial-#", path)
    path = re.sub(r"[^/]*-\d+-[0-9a-f]{8}", "WORKER", path)
    path = re.sub(r"\.\w{8}\.tmp$", ".tmp", path)
    path = re.sub(r"[0-9a-f]{12,}", "ID", path)
    return re.sub(r"\d+", "#", path)


class _Written:
    """A file open for writing, whose writes can fail."""

    def __init__(self, file: Any, about: str, injector: Injector):
        self._file, self._about, self._injector = file, about, injector

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._injector.call("write", self._about, half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


_original: dict[str, Any] = {"open": builtins.open}


@contextlib.contextmanager
def injected(fault: Mapping[str, Any] | None, roots: Sequence[str], fired: Path) -> Iterator[list[str]]:
    """Counts, and fails, calls about what is below `roots`; gives the list of them."""
    if not roots:
        yield []
        return
    injector = Injector(fault, roots, fired)
    undo: list[Callable[[], None]] = []

    def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = getattr(owner, name)
        setattr(owner, name, make(before))
        undo.append(lambda: setattr(owner, name, before))

    _files(injector, patch)
    _safetensors(injector, patch)
    _storage(injector, patch)
    _model(injector, patch)
    try:
        yield injector.calls
    finally:
        for step in reversed(undo):
            step()


Patch = Callable[[Any, str, Callable[[Any], Any]], None]


def _files(injector: Injector, patch: Patch) -> None:
    def opening(before: Any) -> Any:
        def open_(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
            about = injector.path(f"/proc/self/fd/{file}" if isinstance(file, int) else file)
            writes = any(letter in mode for letter in "wax+")
            injector.call("create" if writes else "read", about)
            opened = before(file, mode, *more, **options)
            return _Written(opened, about, injector) if writes and about is not None else opened

        return open_

    def plain(op: str) -> Callable[[Any], Any]:
        def make(before: Any) -> Any:
            def call(path: Any = ".", *more: Any, **options: Any) -> Any:
                injector.call(op, injector.path(path) if options.get("dir_fd") is None else None)
                return before(path, *more, **options)

            return call

        return make

    def open_low(before: Any) -> Any:
        def call(path: Any, flags: int, *more: Any, **options: Any) -> Any:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            injector.call("create" if writes else "read", injector.path(path))
            return before(path, flags, *more, **options)

        return call

    def locking(before: Any) -> Any:
        def call(descriptor: int, operation: int) -> Any:
            with contextlib.suppress(OSError):
                injector_path = injector.path(os.readlink(f"/proc/self/fd/{descriptor}"))
                if operation & fcntl.LOCK_EX:
                    about = injector_path
                    injector.call(LOCK, about)
                    return before(descriptor, operation)
            return before(descriptor, operation)

        return call

    patch(builtins, "open", opening)
    patch(io, "open", opening)
    patch(os, "open", open_low)
    for name, op in {
        "replace": "rename",
        "rename": "rename",
        "mkdir": "mkdir",
        "unlink": "remove",
        "remove": "remove",
        "rmdir": "rmdir",
        "scandir": "list",
        "listdir": "list",
        "stat": "stat",
    }.items():
        patch(os, name, plain(op))
    patch(fcntl, "flock", locking)


def _safetensors(injector: Injector, patch: Patch) -> None:
    """Its functions write and read in another language: they fail as a whole."""
    import safetensors
    import safetensors.torch

    targets = {
        id(safetensors.safe_open): ("load", 0),
        id(safetensors.torch.load_file): ("load", 0),
        id(safetensors.torch.save_file): ("save", 1),
        id(getattr(safetensors, "serialize_file", None)): ("save", 1),
    }

    def making(op: str, position: int) -> Callable[[Any], Any]:
        def make(before: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                path = arguments[position] if len(arguments) > position else options.get("filename")

                def half() -> None:
                    before(*arguments, **options)
                    os.truncate(path, os.path.getsize(path) // 2)

                injector.call(op, injector.path(path), half)
                return before(*arguments, **options)

            return call

        return make

    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(("mergesearch", "transformers.modeling_utils", "safetensors")):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in targets and value is not None:
                patch(module, name, making(*targets[id(value)]))


def _storage(injector: Injector, patch: Patch) -> None:
    from sqlalchemy.engine.default import DefaultDialect

    def executing(before: Any) -> Any:
        def call(self: Any, cursor: Any, statement: str, *more: Any, **options: Any) -> Any:
            words = re.split(r"[\s(]+", statement.strip())
            table = next((words[i + 1] for i, word in enumerate(words[:-1]) if word in ("INTO", "FROM", "UPDATE")), "")
            injector.call("execute", f"{words[0]} {table}".strip())
            return before(self, cursor, statement, *more, **options)

        return call

    def committing(before: Any) -> Any:
        def call(self: Any, connection: Any) -> Any:
            injector.call("commit", "study")
            return before(self, connection)

        return call

    patch(DefaultDialect, "do_execute", executing)
    patch(DefaultDialect, "do_commit", committing)


def _model(injector: Injector, patch: Patch) -> None:
    from transformers import LlamaForCausalLM

    from mergesearch.engine.live import Engine

    def forward(before: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            spoilt = injector.call("forward", "model")
            result = before(self, *arguments, **options)
            if spoilt == NAN:
                result.logits.fill_(float("nan"))
            return result

        return call

    def loading(before: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            injector.call("build", "candidate")
            return before(self, *arguments, **options)

        return call

    patch(LlamaForCausalLM, "forward", forward)
    patch(Engine, "load", loading)
