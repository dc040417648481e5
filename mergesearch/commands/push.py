"""`mergesearch push`: a candidate of a run, with its model card, uploaded to the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mergesearch import leftovers
from mergesearch.checkpoints.hub import check_id, create_repository, upload
from mergesearch.commands.best import SEAL, is_whole, refresh_card
from mergesearch.commands.export import BEST, chosen, export_trial
from mergesearch.commands.originals import Originals
from mergesearch.results.loading import load_run, recipe_of
from mergesearch.results.record import Record

log: logging.Logger = logging.getLogger(__name__)


def push_trial(
    path: Path,
    name: str,
    trial: str = BEST,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    allow_changed: bool = False,
    say: Callable[[str], None] = log.warning,
) -> tuple[Record, str]:
    """Uploads one candidate of a run as a model, and returns its record and the address of the commit.

    The winner that lies in the run folder is uploaded as it is; anything else is exported first, beside it, for as long
    as that takes.

    Args:
        path: the run folder.
        name: the repository on the hub, `OWNER/NAME`; it is made if it is not there.
        trial: `best`, or a trial's number.
        private: whether a new repository is for its owner alone.
        revision: a branch; None for the main one.
        message: of the commit; None for a plain one.
        allow_changed: also where models have other weights than the run was scored with.
        say: told what is being done.

    Raises:
        UserError: no such run or trial, a name that the hub does not take, the hub cannot be reached or refuses, or a
            model was changed.
    """
    check_id(name)
    run = load_run(path)
    record = chosen(run, trial)
    create_repository(name, private)  # before any model is loaded
    text = message or f"{run.config.name}, trial {record.number}, merged by mergesearch"
    if record == run.best() and is_whole(run.folder.best, recipe_of(record)):
        Originals(run.pinned, run.digests, allow_changed, say).check()
        refresh_card(run, record)
        return record, _upload(run.folder.best, name, text, revision, say)
    out = leftovers.partial(run.folder.path / "push")  # a name by which a later command knows whose it was
    leftovers.clear(out.parent)
    try:
        export_trial(path, out, trial, allow_changed=allow_changed, say=say)
        return record, _upload(out, name, text, revision, say)
    finally:
        leftovers.discard(out)


def _upload(folder: Path, name: str, message: str, revision: str | None, say: Callable[[str], None]) -> str:
    say(f"uploading {folder}")
    return upload(folder, name, message, (SEAL,), revision)
