"""What goes wrong, said so that the reader knows what to do next."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

# who asks and the password in a URL, as far as they can be told apart in a text, and passwords among its options
_IN_URL = re.compile(r"(\w[\w+.-]*://[^\s:/?@]*:)([^\s'\"]*)@")
_IN_QUERY = re.compile(r"([?&](?:password|passwd|passphrase|pwd|sslpassword|secret|token)=)([^&\s'\"]*)", re.IGNORECASE)
# what names a variable of the environment says nothing of its value
_VARIABLE = re.compile(r"\$\{\w+\}")
# what to do about what the system refused
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    errno.ENAMETOOLONG: "give a shorter name",
}
# of a name in a message, as much as one can read
_LONGEST = 200
# stands where a password was
HIDDEN = "***"


class UserError(Exception):
    """The user's input is wrong: one sentence with what, the value, where, and the remedy. Exit status 2.

    >>> from mergesearch import UserError, load_run
    >>> try:
    ...     load_run("nowhere")
    ... except UserError as error:
    ...     print(error)
    nowhere is no run folder (it has no config.yaml): name the output folder of `mergesearch run`
    """


class CandidateError(Exception):
    """One candidate could not be built or scored; the trial fails with this reason and the search goes on.

    >>> from mergesearch import CandidateError
    >>> issubclass(CandidateError, Exception)
    True
    """


class RunError(CandidateError):
    """No worker can go on with a run as it is. Exit status 1; of `mergesearch worker` 3, so that it is not
    started again.

    >>> issubclass(RunError, CandidateError)
    True
    """


class StorageError(BaseException):
    """The study's storage failed, which is no fault of a candidate: the run ends, and goes on at its next start. Exit
    status 1.

    No `Exception`, as an interruption is none: it may be met wherever the run is watched, while a candidate is scored,
    and whoever guards against a candidate's faults there must let it through.
    """


def of_system(error: OSError) -> str:
    """What the system refused, and what to do about it, for a call that nobody expected to fail.

    >>> of_system(OSError(errno.ENOSPC, "No space left on device", "run/config.yaml"))
    'run/config.yaml cannot be used (No space left on device): make room, then give the same command again'
    """
    name = str(error.filename if error.filename is not None else "a file")
    shown = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    remedy = _REMEDIES.get(error.errno or 0, "check the disk it is on")
    return f"{shown} cannot be used ({error.strerror}): {remedy}, then give the same command again"


class CutError(BaseException):
    """A file that is read as it is needed was cut short meanwhile, which is no fault of a candidate: the work ends
    before the system ends it with SIGBUS. Exit status 1.

    No `Exception`, for the reason that `StorageError` is none.
    """


def without_passwords(text: str) -> str:
    """The text with `***` for each password of a URL in it; one that the environment holds, `${NAME}`, stays.

    >>> without_passwords("storage postgresql://me:secret@host/runs is away")
    'storage postgresql://me:***@host/runs is away'
    """

    def hidden(match: re.Match[str]) -> str:
        end = "@" if match.re is _IN_URL else ""
        return f"{match[1]}{match[2] if _VARIABLE.fullmatch(match[2]) else HIDDEN}{end}"

    return _IN_QUERY.sub(hidden, _IN_URL.sub(hidden, text))


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, or None where nothing resembles it."""
    closest = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return closest[0] if closest else None


def unknown(kind: str, value: str, options: Iterable[str], where: str) -> UserError:
    """A `UserError` for a name that is not among `options`: quotes it and names the nearest, or all of them.

    >>> str(unknown("method", "tise", ["ties", "linear"], "rules[0]"))
    "unknown method 'tise' in rules[0]: did you mean 'ties'? (known: linear, ties)"
    """
    options = sorted(str(o) for o in options)
    close = nearest(value, options)
    hint = f"did you mean {close!r}? " if close else ""
    known = ", ".join(options) if options else "none"
    return UserError(f"unknown {kind} {value!r} in {where}: {hint}(known: {known})")
