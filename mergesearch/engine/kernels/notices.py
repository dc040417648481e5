"""What a user is told once, however many candidates it holds for."""

from __future__ import annotations

import logging

_said: set[str] = set()


class Unavailable(RuntimeError):
    """No kernel can be built here at all; the message says why, and what would help."""


def once(log: logging.Logger, message: str) -> None:
    """Logs a warning, the same one no second time in this process."""
    if message not in _said:
        _said.add(message)
        log.warning(message)


def without_kernels(log: logging.Logger, reason: Unavailable) -> None:
    """The one line that says that nothing is compiled here."""
    once(log, f"merging without compiled kernels, by torch's own operations: {reason}")
