"""`mergesearch score`: checkpoints and recipes scored on a run's documents."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergesearch.checkpoints import Survey, load_reference, locate
from mergesearch.commands.holding import (
    alone,
    engine_of,
    held,
    holding_of,
    length_of,
    load_pool,
    pool_of,
    settled_with,
    survey_of,
    survey_of_recipe,
)
from mergesearch.commands.inputs import load_tasks, read_recipe, scorer_of, splits
from mergesearch.commands.originals import Originals
from mergesearch.config import Config
from mergesearch.engine.plan import DTYPES, check
from mergesearch.engine.residency import Holding, Needs, residency
from mergesearch.engine.splitting import dispatch
from mergesearch.errors import UserError, unknown
from mergesearch.evaluate.scores import Scores
from mergesearch.evaluate.tasks import Split, Task
from mergesearch.recipe import Recipe
from mergesearch.results.loading import SETTLED, batch_size_of
from mergesearch.search.store import DIGESTS, look_up

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
    settled = _noted(config, say, SETTLED)
    live, tokenizer, holding = _live(model, config, tasks, documents, settled)
    scorer = scorer_of(config.by_lm_eval, live, tokenizer, tasks, documents, batch_size=batch_size_of(config, settled))
    settled_with(config, scorer, holding, settled)
    return scorer.score()


def score_recipes(candidates: Mapping[str, Recipe], config: Config, on: str = HOLDOUT) -> dict[str, Scores]:
    """The scores of several recipes of one run on the same documents, by name.

    Raises:
        UserError: what is wrong with the input.
        CandidateError: one of them cannot be built or scored.
    """
    tasks = load_tasks(config)
    documents = {label: _side(part, on) for label, part in splits(config, tasks).items()}
    survey, settled = survey_of(config), look_up(config, SETTLED) or {}
    holding = holding_of(config, survey, length_of(config, survey, tasks, documents), settled)
    engine = engine_of(load_pool(config, survey, holding), config.dtype, holding, config.score_as)
    rows = batch_size_of(config, settled)
    scorer = scorer_of(config.by_lm_eval, engine.model, engine.pool.tokenizer, tasks, documents, batch_size=rows)
    settled_with(config, scorer, holding, settled)
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


def _noted(config: Config, say: Callable[[str], None], key: str = DIGESTS) -> Mapping[str, Any]:
    """What the run noted under a key. A score needs no run, so that a storage out of reach is told, once."""
    try:
        return look_up(config, key) or {}
    except UserError as error:
        if key == DIGESTS:
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


def _live(
    model: str,
    config: Config,
    tasks: Sequence[Task],
    documents: Mapping[str, Sequence[int]],
    settled: Mapping[str, Any],
) -> tuple[Any, Any, Holding]:
    """The live model of a recipe or a checkpoint, its tokenizer, and where it is held."""
    if _is_recipe(model):
        recipe = read_recipe(model)
        check(recipe)
        asked = config.model_copy(update={"dtype": recipe.out_dtype})
        survey = survey_of_recipe(recipe, config.trust_remote_code)
        holding = holding_of(asked, survey, length_of(asked, survey, tasks, documents), settled)
        engine = engine_of(pool_of(survey, holding, config.allow_unrelated), recipe.out_dtype, holding, config.score_as)
        engine.load(recipe)
        return engine.model, engine.pool.tokenizer, holding
    survey, needs = _surveyed(model, config), Needs(0, 0)
    if survey is not None:
        needs = alone(config, survey, length_of(config, survey, tasks, documents), settled)
    holding = held(residency(needs, config.device))
    dtype = DTYPES[config.dtype]
    live, tokenizer = load_reference(model, config.base_model, "MODEL", dtype, config.trust_remote_code)
    return (dispatch(live, holding.devices), tokenizer, holding)


def _surveyed(model: str, config: Config) -> Survey | None:
    """What a checkpoint's headers say; None where something is wrong with it, which whoever reads it says of MODEL."""
    over_base = locate(model, "MODEL").folder is None
    base, tokenizer = (config.base_model, "MODEL") if over_base else (None, "base")
    try:
        return Survey(base, {"MODEL": model}, config.trust_remote_code, tokenizer)
    except UserError:
        return None


def _side(part: Split, on: str) -> list[int]:
    return {SEARCH: part.search, HOLDOUT: part.holdout, ALL: sorted(part.search + part.holdout)}[on]
