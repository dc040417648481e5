"""Running the command inside the test's own process: the libraries it needs are imported once for all tests."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from mergesearch import cli
from scripts.bench.shared import zoo1

QUICKSTART = str(zoo1.QUICKSTART)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def mergesearch(*arguments: object) -> Done:
    """Exit status and output of `mergesearch ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["mergesearch", *(str(argument) for argument in arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = cli.status()
    return Done(status, out.getvalue(), err.getvalue())


def lm_eval(*arguments: object, cwd: Path) -> None:
    """`lm_eval ARGUMENTS` in the folder `cwd`."""
    from lm_eval._cli import HarnessCLI

    argv, before = ["lm_eval", *(str(argument) for argument in arguments)], Path.cwd()
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            command = HarnessCLI()
            command.execute(command.parse_args())
    finally:
        os.chdir(before)


def sets(**changes: object) -> list[str]:
    """`--set` options; a double underscore stands for the dot in a key."""
    return [part for key, value in changes.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def small(output: Path, trials: int = 6, limit: int = 12, **changes: object) -> list[str]:
    """Options that make the quickstart small: few documents and trials, parents and a study, float32, lm-eval's own
    model, its own run folder."""
    limits = {f"tasks__{position}__limit": limit for position in range(4)}
    study = {"search__strategy": "study", "search__sampler": "tpe", "search__defaults": "false"}
    keys = {
        "dtype": "float32",
        "scoring": "lm_eval",
        "search__trials": trials,
        "output": output,
        **study,
        **limits,
        **changes,
    }
    return sets(**keys)
