"""The URL of a run's storage: what may stand in it, and how its password stays out of every file and message.

A password is never written down: where the configuration is kept it is `***`, and two configurations that differ in it
alone are the same. So whoever reads the run later brings it, in the environment.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote

from mergesearch.errors import HIDDEN, UserError, without_passwords

# the password of a storage whose URL was kept without it
PASSWORD = "MERGESEARCH_STORAGE_PASSWORD"
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_WHO = re.compile(r"://(.*)@")
_PASSWORD = re.compile(r"(://[^:/?@]*)(?::[^@].*)?@")
_HIDDEN = re.compile(r":\*\*\*(@)|(?<=[?&])\w+=\*\*\*&?")
_IN_MEMORY = re.compile(r"sqlite(\+\w+)?:(//)?(/?$|/*:memory:|.*[?&]mode=memory|/*file::memory:|/*\?)", re.IGNORECASE)


def check_url(url: str) -> str:
    """The URL of a storage.

    Raises:
        ValueError: it can be none, whatever the machine.
    """
    shown = without_passwords(url)
    if _IN_MEMORY.match(url):
        raise ValueError(
            f"{shown!r} is SQLite in memory, and nothing of the run would be left: name a file, sqlite:///FILE, or "
            "leave storage out"
        )
    if "://" not in url and not _VARIABLE.match(url):
        raise ValueError(
            f"{shown!r} is no URL of a database: write it as postgresql://USER@HOST/NAME, mysql://USER@HOST/NAME or "
            "sqlite:///FILE, or leave storage out"
        )
    return url


def address(text: str) -> tuple[str, int]:
    """The host and the port of a proxy.

    Raises:
        ValueError: it is no `HOST:PORT`.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is no address of a proxy: write it as HOST:PORT")
    return host, int(port)


def variables(url: str) -> list[str]:
    """The names of the environment's variables that a URL names."""
    return _VARIABLE.findall(url)


def expanded(url: str) -> str:
    """The URL with what the environment holds of it: each `${NAME}`, and the password that was left out of files.

    Raises:
        UserError: a variable is not set.
    """
    who = _WHO.search(url)

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise UserError(
                f"storage {without_passwords(url)} names {match[0]}, and the environment has no {match[1]}: set it, or "
                "take it out of the URL"
            )
        # elsewhere it may be a part of the URL, or all of it
        inside = who is not None and who.start(1) <= match.start() < who.end(1)
        return quote(found, safe="") if inside else found

    return _HIDDEN.sub(_brought, _VARIABLE.sub(value, url))


def _brought(hidden: re.Match[str]) -> str:
    """What stands for a password that was left out; nothing where the driver has to find one by itself."""
    password = os.environ.get(PASSWORD)
    return hidden[0].replace(HIDDEN, quote(password, safe="")) if password is not None else hidden[1] or ""


def same(ours: str | None, theirs: str | None) -> bool:
    """Whether two URLs name one storage: their passwords may differ."""
    return ours == theirs or (ours is not None and theirs is not None and _bare(ours) == _bare(theirs))


def _bare(url: str) -> str:
    return _PASSWORD.sub(r"\1@", without_passwords(url))
