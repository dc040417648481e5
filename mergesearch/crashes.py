"""What ends a process without a word, said by another one."""

from __future__ import annotations

import faulthandler
import functools
import os
import subprocess
import sys

SAID = (
    "error: the system ended this process as a file mapped into memory could no longer be read (SIGBUS): a model's "
    "file was cut short, or its disk failed, while it was read; put the whole file back and type the same command again"
)
# waits for what faulthandler writes as the process ends, and says nothing where it ends by itself
_WAITS = """
import os, sys
told = sys.stdin.buffer.read().decode(errors="replace")
if "Bus error" in told and not os.environ.get("MERGESEARCH_DEBUG"):
    told = sys.argv[1] + "\\n"
sys.stderr.write(told)
"""


@functools.cache
def explain() -> subprocess.Popen[bytes] | None:
    """Lets a process of its own, which costs nothing until then, say that this one was ended by SIGBUS or the like.

    That signal cannot be caught: what is mapped is read in the middle of arithmetic. Nothing is done where Python's
    faulthandler is at work already, as somebody wants its words.
    """
    if os.name != "posix" or faulthandler.is_enabled() or not sys.executable:
        return None
    theirs, ours = os.pipe()
    try:
        waiting = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAITS, SAID],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # an interruption from the keyboard is for this process alone
        )
    except OSError:
        os.close(ours)
        return None
    finally:
        os.close(theirs)
    faulthandler.enable(ours, all_threads=False)
    return waiting
