"""A run made ready, and its winner exported."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch import mergekit
from mergesearch import recipe as recipes
from mergesearch.checkpoints import Pool, new_folder, remove
from mergesearch.commands.inputs import check_racing, load_pool, load_tasks, samples_of, scorer_of, splits
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.errors import UserError
from mergesearch.evaluate.blocks import BlockScorer
from mergesearch.recipe import Recipe
from mergesearch.results.card import Story, model_card, write_checkpoint
from mergesearch.results.record import Record, ranked, read_records, record_of, records
from mergesearch.results.report import Report, card
from mergesearch.search import store, strategies
from mergesearch.search.budget import costs
from mergesearch.search.history import History
from mergesearch.search.soup.learner import Learner
from mergesearch.search.store import RunFolder, open_study, write_atomically, write_documents
from mergesearch.search.worker import Search, machine
from mergesearch.space import Space, check_space, space_of

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A search with all that it works on."""

    config: Config
    folder: RunFolder
    pool: Pool
    engine: Engine
    search: Search


def _ignore(_: Any) -> None:
    """Stands in for a listener nobody gave."""


def prepare(
    config: Config,
    *,
    say: Callable[[str], None] = log.info,
    started: Callable[[Record], None] = _ignore,
    finished: Callable[[Record], None] = _ignore,
) -> Session:
    """Everything that `Search.run` needs. All of the input is checked before anything is written.

    Args:
        config: the run's configuration.
        say: told in a few words what is being done.
        started, finished: as for `Search`.

    Raises:
        UserError: what is wrong with the input.
    """
    check_space(config)
    RunFolder(config.folder).check(config)
    store.begun(config)
    strategies.refuse(config)
    say(f"loading {len(config.scored)} tasks")
    tasks = load_tasks(config)
    documents = splits(config, tasks)
    check_racing(config, tasks)
    say(f"loading the base and {len(config.models)} models")
    pool = load_pool(config)
    for note in pool.notes:
        say(f"note: {note}")
    space, coarse = spaces(config, pool)
    engine = Engine(pool, config.dtype)
    say("building requests")
    searched = {label: part.search for label, part in documents.items()}
    scorer = scorer_of(config, engine.model, pool.tokenizer, tasks, searched)
    blocks = BlockScorer(scorer, searched, config.racing.blocks, config.search.seed) if config.racing else None
    folder = RunFolder.prepare(config)
    write_documents(folder, samples_of(tasks, documents))
    each = sum(map(len, searched.values()))
    search = Search(
        config,
        folder,
        space,
        engine,
        blocks or scorer,
        coarse=coarse,
        infos=pool.infos,
        layers=pool.layers,
        learner=Learner(config, engine, scorer, pool.infos, pool.layers, searched, say),
        started=lambda trial: started(record_of(trial, store.objective_of(search.study))),
        finished=lambda trial: finished(record_of(trial, store.objective_of(search.study))),
        device=str(pool.device),
    )
    store.note(search.study, "tokens_per_document", scorer.prompt_tokens / max(1, each))
    return Session(config, folder, pool, engine, search)


def spaces(config: Config, pool: Pool) -> tuple[Space, Space | None]:
    """What may be proposed, and the coarse space that a study begins with where it grows."""
    space = space_of(config, pool.infos, pool.layers)
    if not config.space.grow or config.space.stack:
        return space, None
    small = {"layer_groups": 1, "components": ["all"], "depth": "groups", "method_per": "recipe", "ranges_for": []}
    whole = config.model_copy(update={"space": config.space.model_copy(update=small)})
    return space, space_of(whole, pool.infos, pool.layers)


def words_of(run: Path) -> list[str]:
    """What a run has to say beside its table: notes, what it cost, what is left of its budget.

    Raises:
        UserError: it is no run folder, or its storage cannot be read.
    """
    folder = RunFolder.open(run)
    config = folder.config()
    history = History(open_study(config, folder, create=False), config)
    objective = [f"note: {note}" for note in history.objective.notes] if history.objective else []
    return [*objective, *(f"note: {note}" for note in strategies.words(history)), *costs(history)]


def refresh_best(session: Session) -> Record | None:
    """Exports the best candidate so far to the run folder, unless it is there already. None where there is none."""
    best = _best(records(session.search.history()))
    if best is None:
        return None
    recipe = Recipe.from_data(dict(best.recipe or {}), f"trial {best.number}")
    there = session.folder.best / "recipe.yaml"
    if not there.is_file() or recipes.read(there).id != recipe.id:
        remove(session.folder.best)
        story = _story(session.folder, session.config, best, records(session.search.history()))
        write_checkpoint(recipe, session.engine, session.folder.best, story)
    return best


def export_trial(run: Path, out: Path, trial: str = "best", max_shard_size: str = "5GB") -> Record:
    """Writes one candidate of a run as a checkpoint, and returns its record.

    Args:
        run: the run folder.
        out: the new folder.
        trial: `best`, or a trial's number.

    Raises:
        UserError: no such run or trial, or `out` is no new folder.
    """
    config, found, _ = read_records(run)
    record = _chosen(found, trial, run)
    recipe = Recipe.from_data(dict(record.recipe or {}), f"trial {record.number}")
    with new_folder(out):  # refuses an unusable name before any model is loaded
        pass
    Path(out).rmdir()
    engine = Engine(load_pool(config), config.dtype)
    write_checkpoint(recipe, engine, out, _story(RunFolder(run), config, record, found), max_shard_size)
    return record


def export_mergekit(run: Path, out: Path, trial: str = "best") -> tuple[Record, list[str]]:
    """Writes one candidate of a run as a file for mergekit; returns its record and what mergekit cannot reproduce.

    Args:
        run: the run folder.
        out: the new file.
        trial: `best`, or a trial's number.

    Raises:
        UserError: no such run or trial, a recipe that mergekit cannot express, or `out` exists or cannot be written.
    """
    config, found, _ = read_records(run)
    record = _chosen(found, trial, run)
    recipe = Recipe.from_data(dict(record.recipe or {}), f"trial {record.number}")
    if out.exists():
        raise UserError(f"{out} exists already: name a new file")
    text, notes = mergekit.export(recipe, trust_remote_code=config.trust_remote_code)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): name another file") from None
    return record, notes


def holdout_report(folder: RunFolder) -> Path:
    """Where the last report on the holdout is."""
    return folder.holdout / "report.json"


def refresh_card(folder: RunFolder, config: Config, found: Sequence[Record], winner: Record) -> None:
    """Writes the model card of the winner in the run folder anew, if it is there."""
    recipe = Recipe.from_data(dict(winner.recipe or {}), f"trial {winner.number}")
    there = folder.best / "recipe.yaml"
    if there.is_file() and recipes.read(there).id == recipe.id:
        write_atomically(folder.best / "README.md", model_card(recipe, _story(folder, config, winner, found)))


def _best(found: Sequence[Record]) -> Record | None:
    first = next(iter(ranked(found)), None)
    return first if first and first.objective is not None and not first.infeasible else None


def _chosen(found: Sequence[Record], trial: str, run: Path) -> Record:
    if trial == "best":
        best = _best(found)
        if best is None:
            raise UserError(f"{run} has no finished trial to export: go on with `mergesearch run`")
        return best
    numbers = {str(record.number): record for record in found}
    if trial not in numbers:
        raise UserError(f"--trial {trial}: {run} has trials 0 to {len(found) - 1}: name one of them, or best")
    record = numbers[trial]
    if record.recipe is None:
        raise UserError(f"--trial {trial} is {record.state} and has no recipe yet: name another")
    return record


def _story(folder: RunFolder, config: Config, record: Record, found: Sequence[Record]) -> Story:
    parents = [other for other in found if other.name in (*config.parents, "average") and other.objective is not None]
    shown = [record, *(other for other in parents if other.number != record.number)] if record.scores else []
    return Story(
        title=f"{config.name}, trial {record.number}",
        versions=dict(record.machine) or machine(config.device),
        records=shown,
        tasks={task.task: task.num_fewshot for task in config.scored},
        samples=folder.search_documents() if record.scores else {},
        options=_lm_eval_options(config),
        holdout=_holdout_card(folder, record),
    )


def _holdout_card(folder: RunFolder, record: Record) -> str | None:
    """The candidate's holdout figures, where a report has them."""
    file = holdout_report(folder)
    if not file.is_file():
        return None
    return card(Report.from_data(json.loads(file.read_text(encoding="utf-8"))), record.number)


def _lm_eval_options(config: Config) -> str:
    paths = [*config.include_path] or ['"$(mergesearch zoo)/tasks"']
    parts = [f"--include_path {paths[0]}", f"--batch_size {config.batch_size}"]
    parts += ["--apply_chat_template"] * config.apply_chat_template
    parts += ["--fewshot_as_multiturn"] * config.fewshot_as_multiturn
    parts += [f"--system_instruction {config.system_instruction!r}"] if config.system_instruction else []
    return " ".join(parts)
