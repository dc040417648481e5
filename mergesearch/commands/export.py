"""`mergesearch export`: one candidate of a run as a checkpoint, as an adapter, or as a file for mergekit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mergesearch import mergekit
from mergesearch.checkpoints import check_new_folder, check_shard_size, new_folder
from mergesearch.checkpoints.adapters import write_adapter
from mergesearch.commands.again import with_figures
from mergesearch.commands.holding import engine_of, holding_of, load_pool, survey_of
from mergesearch.commands.merge import told
from mergesearch.commands.originals import Originals
from mergesearch.commands.score import SEARCH, score_model
from mergesearch.commands.story import story_of
from mergesearch.engine.adapting import adapted
from mergesearch.errors import UserError
from mergesearch.recipe import Recipe
from mergesearch.results.card import metadata_of, write_checkpoint
from mergesearch.results.loading import Run, load_run, recipe_of
from mergesearch.results.record import Record

log: logging.Logger = logging.getLogger(__name__)

CHECKPOINT, ADAPTER, MERGEKIT = "checkpoint", "adapter", "mergekit"
FORMATS = (CHECKPOINT, ADAPTER, MERGEKIT)
BEST = "best"


def export_trial(
    path: Path,
    out: Path,
    trial: str = BEST,
    max_shard_size: str = "5GB",
    *,
    allow_changed: bool = False,
    say: Callable[[str], None] = log.warning,
) -> Record:
    """Writes one candidate of a run as a checkpoint, and returns its record.

    Args:
        path: the run folder.
        out: the new folder.
        trial: `best`, or a trial's number.
        max_shard_size: of a safetensors file, as `5GB`.
        allow_changed: export also where models have other weights than the run was scored with.
        say: told which, where that is allowed.

    Raises:
        UserError: no such run or trial, `out` is no new folder, or a model was changed.
    """
    run = load_run(path)
    record = chosen(run, trial)
    recipe = recipe_of(record)
    check_shard_size(max_shard_size)
    check_new_folder(out)  # before any model is loaded
    run = _unchanged(run, allow_changed, say)
    survey = survey_of(run.pinned)
    holding = holding_of(run.pinned, survey, settled=run.settled)
    engine = engine_of(load_pool(run.pinned, survey, holding), run.config.dtype, holding, run.config.score_as)
    write_checkpoint(recipe, engine, out, story_of(run, with_figures(run, record, engine, say)), max_shard_size)
    for line in told(recipe, engine.pool):
        say(line)
    return record


def export_adapter(
    path: Path,
    out: Path,
    trial: str = BEST,
    rank: int | None = None,
    *,
    allow_changed: bool = False,
    say: Callable[[str], None] = log.warning,
) -> tuple[Record, list[str]]:
    """Writes one candidate of a run as a PEFT adapter over the run's base; returns its record and how near it is.

    Where more than rounding is missing of the change, the adapter over its base is scored on the search documents, so
    that the loss is known in scores too.

    Args:
        path: the run folder.
        out: the new folder.
        trial: `best`, or a trial's number.
        rank: the largest of a layer; None for the sum of the ranks of the run's adapters, 64 where a model is none.
        allow_changed, say: as for `export_trial`.

    Raises:
        UserError: no such run or trial, `out` is no new folder, a model was changed, or a candidate that changes what
            an adapter cannot hold.
    """
    run = load_run(path)
    record = chosen(run, trial)
    recipe = recipe_of(record)
    check_new_folder(out)  # before any model is loaded
    run = _unchanged(run, allow_changed, say)
    pool = load_pool(run.pinned)
    found = adapted(recipe, pool, rank)
    with new_folder(out) as folder:
        write_adapter(found.adapter, str(recipe.base), folder, metadata_of(recipe))
        notes = [str(found), *([] if found.exact else _rescored(run, record, folder, allow_changed, say))]
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (folder / "README.md").write_text(_adapter_card(run, record, recipe, notes), encoding="utf-8")
    return record, notes


def _rescored(run: Run, record: Record, folder: Path, allowed: bool, say: Callable[[str], None]) -> list[str]:
    """What the adapter over its base scores on the search documents, beside the candidate."""
    now = score_model(str(folder), run.config, SEARCH, allow_changed=allowed, say=say)
    lines = []
    for task, score in now.tasks.items():
        before = record.scores.get(task)
        held = f", the candidate {before.value:.4f}" if before is not None else ""
        lines.append(f"{task} {score.metric}: the adapter {score.value:.4f}{held}, on {score.documents} documents")
    return lines


def _adapter_card(run: Run, record: Record, recipe: Recipe, notes: Sequence[str]) -> str:
    told = "\n".join(f"- {note}" for note in notes)
    return f"""# {run.config.name}, trial {record.number}, as an adapter

A PEFT adapter over `{recipe.base}`, made by mergesearch from recipe {recipe.id} (recipe.yaml).

{told}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({str(recipe.base)!r})
model = PeftModel.from_pretrained(base, ".")
```
"""


def export_mergekit(
    path: Path,
    out: Path,
    trial: str = BEST,
    *,
    allow_changed: bool = False,
    say: Callable[[str], None] = log.warning,
) -> tuple[Record, list[str]]:
    """Writes one candidate of a run as a file for mergekit; returns its record and what mergekit cannot reproduce.

    Args:
        path: the run folder.
        out: the new file.
        trial: `best`, or a trial's number.
        allow_changed, say: as for `export_trial`.

    Raises:
        UserError: no such run or trial, a recipe that mergekit cannot express, a model was changed, or `out` exists or
            cannot be written.
    """
    run = load_run(path)
    record = chosen(run, trial)
    if out.exists():
        raise UserError(f"{out} exists already: name a new file")
    run = _unchanged(run, allow_changed, say)
    text, notes = mergekit.export(recipe_of(record), trust_remote_code=run.config.trust_remote_code)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file") from None
    return record, notes


def chosen(run: Run, trial: str) -> Record:
    """A run's winner for `best`, or the trial of that number; `UserError` where there is none with a recipe."""
    if trial == BEST:
        best = run.best()
        if best is None:
            raise UserError(f"{run.path} has no finished trial to export: go on with `mergesearch run`")
        return best
    numbers = {str(record.number): record for record in run.records}
    if trial not in numbers:
        raise UserError(f"--trial {trial}: {run.path} has trials 0 to {len(numbers) - 1}: name one of them, or {BEST}")
    record = numbers[trial]
    if record.recipe is None:
        raise UserError(f"--trial {trial} is {record.state} and has no recipe yet: name another")
    return record


def _unchanged(run: Run, allowed: bool, say: Callable[[str], None]) -> Run:
    """The run, with what was changed since among its words where that is allowed."""
    changes = Originals(run.pinned, run.digests, allowed, say).check()
    return replace(run, changes=tuple(dict.fromkeys([*run.changes, *changes])))
