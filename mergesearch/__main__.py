"""`python -m mergesearch`, and the command itself: it can be interrupted before anything else is loaded."""

from __future__ import annotations

import shlex
import sys

from mergesearch import signals
from mergesearch.errors import without_passwords


def main() -> None:
    """The entry point of the command."""
    signals.how_to_go_on(f"interrupted. To go on: {without_passwords(shlex.join(['mergesearch', *sys.argv[1:]]))}")
    signals.install()
    try:
        from mergesearch.cli import main as command
    except BaseException:
        if signals.is_interrupted():  # whatever a library that was being loaded has made of it
            signals.end_now(1)
        raise
    command()


if __name__ == "__main__":
    main()
