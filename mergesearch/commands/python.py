"""The verbs as functions: what a script or a notebook does that the command does too."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.commands.foreign import read_config
from mergesearch.commands.inputs import read_recipe
from mergesearch.config import Config
from mergesearch.errors import UserError
from mergesearch.evaluate.scores import Scores
from mergesearch.recipe import Recipe
from mergesearch.results import frames
from mergesearch.results.loading import Run
from mergesearch.results.loading import load_run as read_run
from mergesearch.results.record import Record

if TYPE_CHECKING:
    from mergesearch.results.frames import DataFrame
    from mergesearch.results.report import Report

log: logging.Logger = logging.getLogger(__name__)


class OpenedRun(Run):
    """A run as a script has it: what was read of it, as frames, and what the verbs do with it.

    >>> from mergesearch import load_run
    >>> run = load_run("tiny")
    >>> checkpoint = run.export("exported", trial=2)
    >>> (checkpoint / "recipe.yaml").is_file()
    True
    """

    def documents(self, side: str | None = None) -> DataFrame:
        """One row for each trial, task and document; columns as `mergesearch.results.frames.DOCUMENT_COLUMNS` says.

        Args:
            side: `search` or `holdout`; None for both.

        Raises:
            UserError: there is no such side.
        """
        if side not in (None, "search", "holdout"):
            raise UserError(f"side is {side!r}: use 'search', 'holdout' or None for both")
        return frames.documents(self.folder, self.records, ("search", "holdout") if side is None else (side,))

    def report(self) -> DataFrame:
        """The last report on the holdout, one row for each measure and candidate; columns as
        `mergesearch.results.frames.REPORT_COLUMNS` says.

        Raises:
            UserError: there is none: `score_holdout` makes it.
        """
        from mergesearch.commands.story import kept_report

        held = kept_report(self.folder)
        if held is None:
            raise UserError(f"{self.path} has no report on the holdout yet: make it with score_holdout()")
        return frames.report(held)

    def score_holdout(
        self, finalists: int | None = None, documents: int | None = None, *, examples: int | None = None
    ) -> Report:
        """What `mergesearch report` does: scores the finalists on the holdout, once, and says what the winner is worth.

        Args:
            finalists: how many of the best proposals; None for what the configuration says.
            documents: the most of each task; likewise.
            examples: how many documents are kept with both answers; likewise.

        Raises:
            UserError: no holdout, nothing scored yet, or models or tasks that are not those of the run.
        """
        from mergesearch.commands.report import report_run

        return report_run(self.path, finalists, documents, examples=examples)

    def export(self, out: str | Path, trial: int | None = None, max_shard_size: str = "5GB") -> Path:
        """What `mergesearch export` does: writes a candidate as a checkpoint with its model card.

        Args:
            out: the new folder.
            trial: its number; None for the best.
            max_shard_size: of a safetensors file, as `5GB`.

        Raises:
            UserError: no such trial, `out` is no new folder, or a model was changed.
        """
        from mergesearch.commands.export import BEST, export_trial

        export_trial(self.path, Path(out), BEST if trial is None else str(trial), max_shard_size)
        return Path(out)

    def write_page(self, out: str | Path, beside: Sequence[str | Path] = ()) -> Path:
        """Writes the run as one self-contained page for a browser.

        Args:
            out: the file.
            beside: folders of runs to lay beside it.

        Raises:
            UserError: a folder is no run folder, or the file cannot be written.
        """
        from mergesearch.commands.page import write_page

        write_page(self.path, Path(out), beside)
        return Path(out)


def _ignore(_: Any) -> None:
    """Stands in for a listener nobody gave."""


def load_run(path: str | Path) -> OpenedRun:
    """Reads a run folder, whether its search has ended or not.

    >>> from mergesearch import load_run
    >>> run = load_run("tiny")
    >>> run.frame()[["trial", "method", "state"]].shape[1]
    3
    >>> run.best().state
    'complete'
    >>> sorted(set(run.documents("search")["task"]))
    ['zoo_letters']

    Args:
        path: the run folder.

    Raises:
        UserError: it is no run folder, or its storage cannot be read.
    """
    read = read_run(path)
    return OpenedRun(**{each.name: getattr(read, each.name) for each in fields(Run)})


def run_search(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = log.info,
    started: Callable[[Record], None] = _ignore,
    scored: Callable[[Record], None] = _ignore,
    finished: Callable[[Record], None] = _ignore,
    export: bool = True,
    allow_changed: bool = False,
) -> OpenedRun:
    """What `mergesearch run` does: searches, or goes on where an earlier call stopped, exports the winner to `best/` in
    the run folder, and returns the run.

    >>> import mergesearch
    >>> config = mergesearch.Config(
    ...     name="tiny", output="tiny", base_model="zoo:base", models={"order": "zoo:order", "letters": "zoo:letters"},
    ...     tasks=[{"task": "zoo_letters", "metric": "acc", "limit": 4}], dtype="float32",
    ...     search={"strategy": "random", "trials": 1, "defaults": False})
    >>> seen = []
    >>> run = mergesearch.run_search(config, finished=seen.append)
    >>> [record.name for record in seen][:4]
    ['base', 'order', 'letters', 'average']
    >>> len(run.frame())
    5

    Args:
        config: the configuration, or its file; files of mergekit-evolve and mergenetic are converted.
        overrides: as `--set` takes them, `search.trials=10`; for a file alone.
        say: told in a few words what is being done.
        started, scored, finished: told of each trial when it begins, when it has its scores, and when it has ended.
        export: whether the winner is exported.
        allow_changed: go on with other weights or documents than the run was scored with.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: nothing could be scored.
    """
    from mergesearch.commands.hooks import told_at_end
    from mergesearch.commands.report import report_at_end
    from mergesearch.commands.run import prepare
    from mergesearch.commands.winner import verdict_of

    if isinstance(config, Config):
        if overrides:
            raise UserError("overrides are for a configuration's file: change the Config itself")
        settings = config
    else:
        settings = read_config(config, overrides, say)
    with told_at_end(settings, lambda: verdict_of(settings.folder), say):
        session = prepare(
            settings, say=say, started=started, scored=scored, finished=finished, allow_changed=allow_changed
        )
        session.run(say)
        session.score_again(say)
        if export:
            for line in session.export_best():
                say(line)
        report_at_end(session.read(), session.engine, allow_changed=allow_changed)
    return load_run(settings.folder)


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    max_shard_size: str = "5GB",
    allow_unrelated: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """What `mergesearch merge` does: builds a checkpoint from a recipe, and returns its folder.

    >>> from mergesearch import Recipe, merge
    >>> rules = [{"method": "ties", "parameters": {"density": 0.5}}]
    >>> models = {"order": "zoo:order", "letters": "zoo:letters"}
    >>> recipe = Recipe.from_data({"base": "zoo:base", "models": models, "rules": rules}, "my recipe")
    >>> sorted(file.name for file in merge(recipe, "merged").glob("*.safetensors"))
    ['model.safetensors']

    Args:
        recipe: what to merge, or its YAML file, native or mergekit's.
        out: the new folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        max_shard_size: of a safetensors file, as `5GB`.
        allow_unrelated: accept models that share no base.
        trust_remote_code: run code from the models' folders.

    Raises:
        UserError: the recipe cannot be merged, or `out` is no new folder.
        CandidateError: the merge came out with NaN or infinity.
    """
    from mergesearch.commands.merge import merge_recipe

    stated = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    merge_recipe(stated, Path(out), device, max_shard_size, allow_unrelated, trust_remote_code)
    return Path(out)


def score(model: str | Path, config: Config | str | Path, on: str = "search", *, allow_changed: bool = False) -> Scores:
    """What `mergesearch score` does: the scores of a checkpoint, or of a recipe's file, on a run's documents.

    >>> from mergesearch import load_run, score
    >>> scores = score("zoo:letters", load_run("tiny").config)
    >>> scores.tasks["zoo_letters"].documents
    4

    Args:
        model: a folder, `zoo:NAME`, a hub id, or the path of a recipe.
        config: the run's configuration, or its file: tasks, split, batch size, dtype, device.
        on: `search`, `holdout` or `all` documents.
        allow_changed: score also where documents or weights are not those of the run.

    Raises:
        UserError: what is wrong with the input, or was changed.
        CandidateError: the model cannot be scored.
    """
    from mergesearch.commands.score import score_model

    settings = config if isinstance(config, Config) else read_config(config)
    return score_model(str(model), settings, on, allow_changed=allow_changed)
