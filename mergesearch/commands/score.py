"""`mergesearch score`: checkpoints and recipes scored on a run's documents."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from mergesearch.checkpoints import choose_device, load_reference
from mergesearch.commands.inputs import load_pool, load_tasks, pool_of, read_recipe, scorer_of, splits
from mergesearch.commands.originals import Originals
from mergesearch.config import Config
from mergesearch.engine.live import Engine
from mergesearch.engine.plan import DTYPES, check
from mergesearch.errors import UserError, unknown
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.tasks import Split
from mergesearch.recipe import Recipe
from mergesearch.results.loading import DIGESTS
from mergesearch.search.store import look_up

log: logging.Logger = logging.getLogger(__name__)

SEARCH, HOLDOUT, ALL = "search", "holdout", "all"
SIDES = (SEARCH, HOLDOUT, ALL)


def score_model(
    model: str,
    config: Config,
    on: str = SEARCH,
    *,
    allow_changed: bool = False,
    say: Callable[[str], None] = log.warning,
) -> Scores:
    """The scores of a checkpoint, or of a recipe's YAML file, on a run's documents.

    Args:
        model: a folder, `zoo:NAME`, a hub id, or the path of a recipe.
        config: the run's configuration: tasks, split, batch size, dtype, device.
        on: `search`, `holdout` or `all` documents.
        allow_changed: score also where the run of that configuration was scored with other documents, or the model is
            one of its models and had other weights.
        say: told which, where that is allowed.

    Raises:
        UserError: what is wrong with the input, or was changed.
        CandidateError: the model cannot be scored.
    """
    if on not in SIDES:
        raise unknown("value", on, SIDES, "--on")
    if on == HOLDOUT and not config.holdout:
        raise UserError("--on holdout, but holdout is 0 in the configuration: use --on search")
    tasks = load_tasks(config)
    documents = {label: _side(part, on) for label, part in splits(config, tasks).items()}
    originals = Originals(config, _noted(config, say), allow_changed, say)
    originals.check(tasks, originals.named(_references(model)))
    live, tokenizer = _live(model, config)
    return scorer_of(_plain(config), live, tokenizer, tasks, documents).score()


def score_recipes(candidates: Mapping[str, Recipe], config: Config, on: str = HOLDOUT) -> dict[str, Scores]:
    """The scores of several recipes of one run on the same documents, by name.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: one of them cannot be built or scored.
    """
    tasks = load_tasks(config)
    documents = {label: _side(part, on) for label, part in splits(config, tasks).items()}
    engine = Engine(load_pool(config), config.dtype)
    scorer = scorer_of(_plain(config), engine.model, engine.pool.tokenizer, tasks, documents)
    scores = {}
    for name, recipe in candidates.items():
        engine.load(recipe)
        scores[name] = scorer.score()
    return scores


def lines_of(scores: Scores) -> list[str]:
    """One line a task."""
    return [
        f"{task} {score.metric}: {score.value:.4f}{f' ± {score.stderr:.4f}' if score.stderr is not None else ''} "
        f"on {score.documents} documents"
        for task, score in scores.tasks.items()
    ]


def json_of(scores: Scores, model: str, on: str) -> str:
    """The scores as JSON; `model` and `on` as `score_model` got them."""
    tasks = {task: score.to_data() for task, score in scores.tasks.items()}
    return json.dumps({"model": model, "on": on, "seconds": scores.seconds, "tasks": tasks}, indent=2)


def _plain(config: Config) -> Config:
    """With lm-eval's own model: what is printed the `lm_eval` command gives too."""
    return config.model_copy(update={"scoring": "lm_eval"})


def _noted(config: Config, say: Callable[[str], None]) -> Mapping[str, Any]:
    """What the run noted of its models and documents. A score needs no run, so that a storage out of reach is told."""
    try:
        return look_up(config, DIGESTS) or {}
    except UserError as error:
        say(f"note: whether models and documents are still those of the run is not known: {error}")
        return {}


def _references(model: str) -> list[str]:
    """What a model is made of, as the user refers to it."""
    if not _is_recipe(model):
        return [model]
    recipe = read_recipe(model)
    return [*([recipe.base] if recipe.base else []), *recipe.models.values()]


def _is_recipe(model: str) -> bool:
    return model.endswith((".yaml", ".yml"))


def _live(model: str, config: Config) -> tuple[Any, Any]:
    if _is_recipe(model):
        recipe = read_recipe(model)
        engine = _engine_for(recipe, config.device, config.allow_unrelated, config.trust_remote_code)
        engine.load(recipe)
        return engine.model, engine.pool.tokenizer
    device = choose_device(config.device)
    live, tokenizer = load_reference(model, config.base_model, "MODEL", DTYPES[config.dtype], config.trust_remote_code)
    return live.to(device), tokenizer


def _engine_for(recipe: Recipe, device: str, allow_unrelated: bool, trust_remote_code: bool) -> Engine:
    check(recipe)
    return Engine(pool_of(recipe, device, allow_unrelated, trust_remote_code), recipe.out_dtype)


def _side(part: Split, on: str) -> list[int]:
    return {SEARCH: part.search, HOLDOUT: part.holdout, ALL: sorted(part.search + part.holdout)}[on]
