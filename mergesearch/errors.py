"""What goes wrong, said so that the reader knows what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong: one sentence with what, the value, where, and the remedy. Exit status 2."""


class CandidateError(Exception):
    """One candidate could not be built or scored; the trial fails with this reason and the search goes on."""


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
