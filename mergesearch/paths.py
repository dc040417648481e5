"""What a relative path is relative to: in a file to that file, on the command line to the caller's folder."""

from __future__ import annotations

import os
from pathlib import Path

from mergesearch.errors import UserError

_EXPLICIT = ("./", "../", "/", "~")


def absolute(path: str | Path, folder: str | Path) -> Path:
    """An absolute path to what `path` names from `folder`; `~` is the user's home.

    Raises:
        UserError: it holds a NUL, which no path can.
    """
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is no path: take the NUL character (\\0) out of it")
    whole = Path(folder, Path(path).expanduser())
    # only the file system knows where the folder above a linked one is
    return whole.resolve() if ".." in whole.parts else whole.absolute()


def absolute_path(path: str, folder: str | Path, where: str) -> str:
    """What is a path in any case, made absolute.

    Args:
        path: as it was written.
        folder: what it is relative to.
        where: the file and the key, for the message.

    Raises:
        UserError: it is relative, and only the caller's folder has it.
    """
    whole = absolute(path, folder)
    if not os.path.exists(whole):
        _refuse_callers(path, folder, where)
    return str(whole)


def absolute_reference(reference: str, folder: str | Path, where: str) -> str:
    """A reference to a checkpoint, made absolute where it is a path; `zoo:NAME` and hub ids stay as they are.

    It is a path if it begins with `./`, `../`, `/` or `~`, or if `folder` has it. Of `MODEL+ADAPTER` each part is taken
    by itself.

    Args:
        reference: as it was written.
        folder: what it is relative to.
        where: the file and the key, for the message.

    Raises:
        UserError: `folder` does not have it and the caller's folder does, or it begins with `./` or `../` and is not
            there.
    """
    if reference.startswith("zoo:") and "+" not in reference:
        return reference
    whole = absolute(reference, folder)
    if os.path.exists(whole):
        return str(whole)
    model, plus, adapter = reference.rpartition("+")
    if plus and model and adapter:
        return "+".join(absolute_reference(part, folder, where) for part in (model, adapter))
    _refuse_callers(reference, folder, where)
    if not (reference.startswith(_EXPLICIT) or reference in (".", "..")):
        return reference
    if Path(reference).expanduser().is_absolute():
        return str(whole)
    raise UserError(f"{where}: no folder {reference!r} in {Path(folder).absolute()}: give the folder of a checkpoint")


def _refuse_callers(path: str, folder: str | Path, where: str) -> None:
    here = absolute(path, Path.cwd())
    if not Path(path).expanduser().is_absolute() and os.path.exists(here):
        raise UserError(
            f"{where}: {path!r} is not in {Path(folder).absolute()} and is in {Path.cwd()}: a path in a file is "
            f"relative to the file, so write {here}"
        )
