"""What the verbs do, as functions: a run made ready, its winner exported, a recipe merged, a checkpoint scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch import mergekit
from mergesearch import recipe as recipes
from mergesearch.checkpoints import Pool, Residency, choose_device, load_reference, locate, new_folder, remove
from mergesearch.config import Config
from mergesearch.engine import DTYPES, Engine, check
from mergesearch.errors import UserError, unknown
from mergesearch.evaluate.blocks import BlockScorer
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.scoring import Scorer, lm_eval_samples
from mergesearch.evaluate.statistics import JACKKNIFE
from mergesearch.evaluate.tasks import Split, Task, load, split
from mergesearch.export import Story, metadata_of, model_card, write_checkpoint, write_words
from mergesearch.recipe import Recipe
from mergesearch.record import Record, ranked
from mergesearch.report import Report, card
from mergesearch.search.baselines import parent_names
from mergesearch.search.store import RunFolder, read_records, records, write_atomically, write_documents
from mergesearch.search.study import Search, machine
from mergesearch.space import SearchSpace, check_space
from mergesearch.streaming import can_stream, stream

log = logging.getLogger(__name__)

SIDES = ("search", "holdout", "all")


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
    say(f"loading {len(config.scored)} tasks")
    tasks = load_tasks(config)
    documents = splits(config, tasks)
    check_racing(config, tasks)
    say(f"loading the base and {len(config.models)} models")
    pool = load_pool(config)
    for note in pool.notes:
        say(f"note: {note}")
    space = SearchSpace(config, pool.infos, pool.layers)
    engine = Engine(pool, config.dtype)
    say("building requests")
    scorer = _scorer(
        config, engine.model, pool.tokenizer, tasks, {label: part.search for label, part in documents.items()}
    )
    if config.racing:
        searched = {label: part.search for label, part in documents.items()}
        scorer = BlockScorer(scorer, searched, config.racing.blocks, config.search.seed)
    folder = RunFolder.prepare(config)
    write_documents(folder, _samples(tasks, documents))
    search = Search(config, folder, space, engine, scorer, started=started, finished=finished, device=str(pool.device))
    return Session(config, folder, pool, engine, search)


def load_tasks(config: Config) -> list[Task]:
    """The tasks of a configuration, once every parent is known to be there: that is quickly said."""
    references = {"base_model": config.base_model, **{f"models.{n}": ref for n, ref in config.models.items()}}
    sources = {where: locate(reference, where) for where, reference in references.items()}
    where_tokenizer = str(sources["base_model"].path)
    return load(config.scored, config.include_path, tokenizer=where_tokenizer, metric=config.objective.metric)


def splits(config: Config, tasks: Sequence[Task]) -> dict[str, Split]:
    """Which documents of each task the search may see; the same for every worker and every start."""
    limits = {task.task: task.limit for task in config.scored}
    return {task.label: split(task, config.holdout, config.search.seed, limits[task.label]) for task in tasks}


def check_racing(config: Config, tasks: Sequence[Task]) -> None:
    """`UserError` where a race cannot compare candidates document by document."""
    raced = {task.task for task in config.tasks}
    whole = next((task for task in tasks if task.aggregation == JACKKNIFE and task.label in raced), None)
    if config.racing and whole is not None:
        raise UserError(
            f"racing compares candidates document by document, and task {whole.label!r} has {whole.metric}, which only "
            "all documents together have: leave racing out, or choose another metric"
        )


def refresh_best(session: Session) -> Record | None:
    """Exports the best candidate so far to the run folder, unless it is there already. None where there is none."""
    best = _best(records(session.search.study))
    if best is None:
        return None
    recipe = Recipe.from_data(dict(best.recipe or {}), f"trial {best.number}")
    there = session.folder.best / "recipe.yaml"
    if not there.is_file() or recipes.read(there).id != recipe.id:
        remove(session.folder.best)
        story = _story(session.folder, session.config, best, records(session.search.study))
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


def merge_recipe(
    recipe: Recipe,
    out: Path,
    device: str = "auto",
    max_shard_size: str = "5GB",
    allow_unrelated: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Builds a checkpoint from a recipe.

    Raises:
        UserError: the recipe cannot be merged, or `out` is no new folder.
        CandidateError: the merge came out with NaN or infinity.
    """
    check(recipe)
    with new_folder(out):  # refuses an unusable name before any model is read
        pass
    Path(out).rmdir()
    chosen = choose_device(device)
    residency: Residency = "mapped" if chosen.type == "cpu" else "device"
    pool = pool_of(recipe, device, allow_unrelated, trust_remote_code, residency)
    story = Story(out.name, machine(str(chosen)))
    if residency != "mapped" or not can_stream(recipe, pool):
        write_checkpoint(recipe, Engine(pool, recipe.out_dtype), out, story, max_shard_size)
        return
    with new_folder(out) as folder:
        stream(recipe, pool, folder, metadata_of(recipe), max_shard_size)
        write_words(recipe, folder, story, pool.notes)


def score_model(model: str, config: Config, on: str = "search") -> Scores:
    """The scores of a checkpoint, or of a recipe's YAML file, on a run's documents.

    Args:
        model: a folder, `zoo:NAME`, a hub id, or the path of a recipe.
        config: the run's configuration: tasks, split, batch size, dtype, device.
        on: `search`, `holdout` or `all` documents.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: the model cannot be scored.
    """
    if on not in SIDES:
        raise unknown("value", on, SIDES, "--on")
    if on == "holdout" and not config.holdout:
        raise UserError("--on holdout, but holdout is 0 in the configuration: use --on search")
    tasks = load_tasks(config)
    documents = {label: _side(part, on) for label, part in splits(config, tasks).items()}
    live, tokenizer = _live(model, config)
    return _scorer(config, live, tokenizer, tasks, documents).score()


def score_recipes(candidates: Mapping[str, Recipe], config: Config, on: str = "holdout") -> dict[str, Scores]:
    """The scores of several recipes of one run on the same documents, by name.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: one of them cannot be built or scored.
    """
    tasks = load_tasks(config)
    documents = {label: _side(part, on) for label, part in splits(config, tasks).items()}
    engine = Engine(load_pool(config), config.dtype)
    scorer = _scorer(config, engine.model, engine.pool.tokenizer, tasks, documents)
    found = {}
    for name, recipe in candidates.items():
        engine.load(recipe)
        found[name] = scorer.score()
    return found


def holdout_scorers(
    config: Config, folder: RunFolder, other_batch_size: int, say: Callable[[str], None] = log.info
) -> tuple[Engine, Scorer, Scorer]:
    """An engine, a scorer of its live model on the holdout, and one that asks in another order and batch size.

    Raises:
        UserError: what is wrong with the input; a task's documents are not those that the run split.
    """
    say(f"loading {len(config.scored)} tasks")
    tasks = load_tasks(config)
    parts = splits(config, tasks)
    if _samples(tasks, parts)["holdout"] != folder.holdout_documents():
        raise UserError(
            f"the tasks' documents are no longer those that {folder.path} was searched with: restore the tasks' data"
        )
    say(f"loading the base and {len(config.models)} models")
    engine = Engine(load_pool(config), config.dtype)
    say("building requests")
    holdout = {label: part.holdout for label, part in parts.items()}
    live, tokenizer = engine.model, engine.pool.tokenizer
    other = config.model_copy(update={"batch_size": other_batch_size, "scoring": "lm_eval"})
    first = _scorer(config, live, tokenizer, tasks, holdout)
    return engine, first, _scorer(other, live, tokenizer, tasks, holdout, shuffle=config.search.seed)


def holdout_report(folder: RunFolder) -> Path:
    """Where the last report on the holdout is."""
    return folder.holdout / "report.json"


def refresh_card(folder: RunFolder, config: Config, found: Sequence[Record], winner: Record) -> None:
    """Writes the model card of the winner in the run folder anew, if it is there."""
    recipe = Recipe.from_data(dict(winner.recipe or {}), f"trial {winner.number}")
    there = folder.best / "recipe.yaml"
    if there.is_file() and recipes.read(there).id == recipe.id:
        write_atomically(folder.best / "README.md", model_card(recipe, _story(folder, config, winner, found)))


def _live(model: str, config: Config) -> tuple[Any, Any]:
    if model.endswith((".yaml", ".yml")):
        recipe = mergekit.read_any(model)
        engine = _engine_for(recipe, config.device, config.allow_unrelated, config.trust_remote_code)
        engine.load(recipe)
        return engine.model, engine.pool.tokenizer
    device = choose_device(config.device)
    live, tokenizer = load_reference(model, config.base_model, "MODEL", DTYPES[config.dtype], config.trust_remote_code)
    return live.to(device), tokenizer


def _engine_for(recipe: Recipe, device: str, allow_unrelated: bool, trust_remote_code: bool) -> Engine:
    check(recipe)
    return Engine(pool_of(recipe, device, allow_unrelated, trust_remote_code), recipe.out_dtype)


def pool_of(
    recipe: Recipe,
    device: str = "auto",
    allow_unrelated: bool = False,
    trust_remote_code: bool = False,
    residency: Residency = "device",
) -> Pool:
    """The parents of a recipe; one without base is built like its first model."""
    return Pool.load(
        recipe.base or next(iter(recipe.models.values())),
        recipe.models,
        device=device,
        allow_unrelated=allow_unrelated,
        trust_remote_code=trust_remote_code,
        tokenizer=recipe.tokenizer,
        residency=residency,
    )


def _side(part: Split, on: str) -> list[int]:
    return {"search": part.search, "holdout": part.holdout, "all": sorted(part.search + part.holdout)}[on]


def load_pool(config: Config) -> Pool:
    """The parents of a configuration; `UserError` says what keeps them from being merged."""
    return Pool.load(
        config.base_model,
        config.models,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        allow_unrelated=config.allow_unrelated,
        tokenizer=config.tokenizer,
    )


def _scorer(
    config: Config,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    documents: Mapping[str, Iterable[int]],
    shuffle: int | None = None,
) -> Scorer:
    return Scorer(
        model,
        tokenizer,
        tasks,
        documents,
        batch_size=config.batch_size,
        scoring=config.scoring,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        shuffle=shuffle,
    )


def _samples(tasks: Sequence[Task], documents: Mapping[str, Split]) -> dict[str, dict[str, list[int]]]:
    search = {label: part.search for label, part in documents.items()}
    holdout = {label: part.holdout for label, part in documents.items() if part.holdout}
    kept_back = [task for task in tasks if task.label in holdout]
    return {"search": lm_eval_samples(tasks, search), "holdout": lm_eval_samples(kept_back, holdout)}


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
    parents = [
        other for other in found if other.name in (*parent_names(config), "average") and other.objective is not None
    ]
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
