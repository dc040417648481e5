"""What a configuration or a recipe file names, made ready: tasks and documents, the pool, the space, the scorer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesearch import mergekit
from mergesearch.checkpoints import Pool, locate
from mergesearch.config import LENGTH, Config, TaskConfig
from mergesearch.errors import UserError
from mergesearch.evaluate import task_code
from mergesearch.evaluate.scoring import Scorer, lm_eval_samples
from mergesearch.evaluate.statistics import JACKKNIFE
from mergesearch.evaluate.tasks import Split, Task, load, refuse_lengths, refuse_thinking, split
from mergesearch.paths import absolute_reference
from mergesearch.recipe import TOWER, Recipe
from mergesearch.schema import read_yaml
from mergesearch.space import Space, space_of

log: logging.Logger = logging.getLogger(__name__)

# where a batch size is still to be found, what requests are built with
PROVISIONAL = 64


def load_tasks(config: Config, say: Callable[[str], None] = log.warning) -> list[Task]:
    """The tasks of a configuration, once every parent is known to be there: that is quickly said.

    Args:
        say: told which Python of the user's the tasks run, before any of it is run.
    """
    if config.trust_tasks is False:  # before a model is fetched
        task_code.refuse(code for found in code_of_tasks(config).values() for code in found)
    tokenizer = where_tokenizer(config)
    if config.trust_tasks is not False and (running := code_of_tasks(config)):
        words = task_code.words(code for found in running.values() for code in found)
        say(f"note: the tasks run Python of their own, {words} (trust_tasks: false refuses it)")
    return _loaded(config, config.scored, tokenizer)


def load_tasks_without_code(config: Config) -> tuple[list[Task], dict[str, list[task_code.TaskCode]]]:
    """The tasks that run no Python of the user's, and what the others would run, by task; none of it is run."""
    tokenizer, running = where_tokenizer(config), code_of_tasks(config)
    rest = [task for task in config.scored if task.task not in running]
    return _loaded(config, rest, tokenizer, complete=not running), running


def _loaded(config: Config, scored: Sequence[TaskConfig], tokenizer: str, complete: bool = True) -> list[Task]:
    tasks = load(
        scored,
        config.include_path,
        tokenizer=tokenizer,
        metric=config.objective.metric,
        complete=complete,
        unsafe_code=config.confirm_run_unsafe_code,
    )
    refuse_lengths(tasks, (guard.task for guard in config.guard if guard.metric == LENGTH))
    if config.enable_thinking:
        refuse_thinking(tasks)
    return tasks


def code_of_tasks(config: Config) -> dict[str, list[task_code.TaskCode]]:
    """The Python that tasks of a configuration would run, for each that would run some."""
    return task_code.code_of([task.task for task in config.scored], config.include_path)


def where_tokenizer(config: Config) -> str:
    """Where the base's tokenizer is; `UserError` where the base or a model is not there."""
    references = {"base_model": config.base_model, **{f"models.{n}": ref for n, ref in config.models.items()}}
    sources = {where: locate(reference, where) for where, reference in references.items()}
    return str(sources["base_model"].path)


def splits(config: Config, tasks: Sequence[Task]) -> dict[str, Split]:
    """Which documents of each task the search may see; the same for every worker and every start."""
    limits = {task.task: task.limit for task in config.scored}
    return {task.label: split(task, config.holdout, config.search.seed, limits[task.label]) for task in tasks}


def check_racing(config: Config, tasks: Sequence[Task]) -> None:
    """`UserError` where a race cannot compare candidates document by document."""
    if config.racing and config.objective.pareto:
        raise UserError("racing compares candidates by one objective, and objective is pareto: leave one of them out")
    raced = {task.task for task in config.tasks}
    whole = next((task for task in tasks if task.aggregation == JACKKNIFE and task.label in raced), None)
    if config.racing and whole is not None:
        raise UserError(
            f"racing compares candidates document by document, and task {whole.label!r} has {whole.metric}, which only "
            "all documents together have: leave racing out, or choose another metric"
        )


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, native or mergekit's, with absolute paths.

    Relative paths in a native recipe are relative to its file. Those in a mergekit file are relative to the caller's
    folder, as they are for mergekit.

    Raises:
        UserError: what is wrong with the file, in one sentence.
    """
    recipe = mergekit.read_any(path)
    folder = Path.cwd() if mergekit.is_mergekit(read_yaml(path)) else Path(path).parent
    base = recipe.base and absolute_reference(recipe.base, folder, f"{path}: base")
    models = {name: absolute_reference(ref, folder, f"{path}: models.{name}") for name, ref in recipe.models.items()}
    return recipe.model_copy(update={"base": base, "models": models})


def spaces(config: Config, pool: Pool) -> tuple[Space, Space | None]:
    """What may be proposed, and the coarse space that a study begins with where it grows."""
    named = TOWER in config.space.components
    infos = list(pool.form.layout.infos) if named else pool.infos
    space = space_of(config, infos, pool.layers)
    if not config.space.grow or config.space.stack:
        return space, None
    small = {"layer_groups": 1, "components": ["all"], "depth": "groups", "method_per": "recipe", "ranges_for": []}
    whole = config.model_copy(update={"space": config.space.model_copy(update=small)})
    return space, space_of(whole, infos, pool.layers)


def scorer_of(
    config: Config,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    documents: Mapping[str, Iterable[int]],
    shuffle: int | None = None,
    batch_size: int | None = None,
    vllm: Callable[..., Any] | None = None,
) -> Scorer:
    """A scorer as a configuration asks for it.

    Args:
        model, tokenizer, tasks, documents, shuffle: as for `Scorer`.
        batch_size: requests at once; None: as the configuration says, and a provisional one where that is to be found.
        vllm: where the configuration has a backend, what `backend.vllm_of` gives.
    """
    if (config.backend is None) != (vllm is None):
        raise ValueError("a scorer has a backend where its configuration has one")
    said = PROVISIONAL if config.batch_size == "auto" else config.batch_size
    return Scorer(
        model,
        tokenizer,
        tasks,
        documents,
        batch_size=batch_size or said,
        scoring=config.scoring,
        vllm=vllm,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        shuffle=shuffle,
        **config.model_args,
    )


def samples_of(tasks: Sequence[Task], documents: Mapping[str, Split]) -> dict[str, dict[str, list[int]]]:
    search = {label: part.search for label, part in documents.items()}
    holdout = {label: part.holdout for label, part in documents.items() if part.holdout}
    kept_back = [task for task in tasks if task.label in holdout]
    return {"search": lm_eval_samples(tasks, search), "holdout": lm_eval_samples(kept_back, holdout)}
