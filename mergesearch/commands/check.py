"""`mergesearch check`: what a recipe or a run would do, found by running every check and merging nothing."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from mergesearch import methods
from mergesearch.checkpoints import Pool
from mergesearch.commands.backend import check_generates, find_backend
from mergesearch.commands.foreign import read_config
from mergesearch.commands.holding import (
    alike,
    check_written,
    engine_of,
    holding_of,
    length_of,
    merging_of,
    survey_of,
    survey_of_recipe,
)
from mergesearch.commands.imagined import imagined
from mergesearch.commands.inputs import (
    check_racing,
    load_tasks,
    load_tasks_without_code,
    read_recipe,
    scorer_of,
    spaces,
    splits,
)
from mergesearch.commands.probe import foreseen, measure
from mergesearch.config import Config
from mergesearch.engine.decomposing import expected
from mergesearch.engine.plan import DTYPES, Job, Step, check, form_of, plan
from mergesearch.engine.residency import Holding, needs_of, residency
from mergesearch.engine.served import check_served
from mergesearch.evaluate import task_code
from mergesearch.evaluate.losses import Losses
from mergesearch.evaluate.scoring import Scorer
from mergesearch.evaluate.tasks import Split, Task
from mergesearch.recipe import TOWER, Recipe, TensorInfo
from mergesearch.results.loading import SETTLED, batch_size_of
from mergesearch.schema import read_yaml
from mergesearch.search import revisions, store, strategies
from mergesearch.search.costs import costs, duration, words_of
from mergesearch.search.estimate import estimate
from mergesearch.search.history import History
from mergesearch.search.soup.learner import Learner, why_no_gradients
from mergesearch.search.store import RunFolder
from mergesearch.search.strategies.learned_soup import LearnedSoups, settings_of, without_gradients
from mergesearch.space import SearchSpace, Space, StackSpace, check_space

log: logging.Logger = logging.getLogger(__name__)

Lines = list[tuple[str, str]]

# bytes that are read or written in a second, about
_READ = 5e8
_ASK = "--set trust_tasks=true runs it"
_UNKNOWN = f"not known without the documents of every task: {_ASK.replace('runs it', 'loads them')}"


def preview(path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = log.warning) -> Lines:
    """Label and text of each line of `mergesearch check`.

    No weights are read: what only their numbers show (NaN, models that share no base) is said when they are.

    Python that the user's tasks name is run where `trust_tasks` is true, and else not.

    Args:
        path: a recipe (native or mergekit's), or a run configuration, ours or another program's: what has `tasks` is a
            configuration.
        overrides: `key=value`, for a configuration.
        say: told what another program's configuration means here.

    Raises:
        UserError: whatever `mergesearch merge` or `mergesearch run` would refuse before they read weights.
    """
    if "tasks" in read_yaml(path):
        return _run(read_config(path, overrides, say))
    return _merge(read_recipe(path))


def _merge(recipe: Recipe) -> Lines:
    check(recipe)
    survey = survey_of_recipe(recipe, weights_alone=True)
    pool = Pool.outline(survey)
    holding, streams = merging_of(recipe, survey)
    jobs = plan(recipe, pool, form_of(recipe, pool))
    return [
        ("recipe", f"{recipe.id}, {len(recipe.rules)} rules, seed {recipe.seed}, to {recipe.out_dtype}"),
        *_parents(pool),
        ("result", _size((job.info.shape for job in jobs), len({job.info.layer for job in jobs}))),
        *_rules(recipe, jobs),
        *_decomposed((job.step, job.info) for job in jobs),
        *_memory(replace(holding, needs=needs_of(survey, DTYPES[recipe.out_dtype])), streams),
    ]


def _run(config: Config) -> Lines:
    begun = time.perf_counter()
    check_space(config)
    check_served(config.score_as)
    backend = find_backend(config)
    RunFolder(config.folder).check(config)
    study = store.begun(config)
    strategies.refuse(config)
    whole = config.trust_tasks is not None
    loading = revisions.at(config, (store.noted(study, revisions.REVISIONS) if study else None) or {})
    tasks, code = (load_tasks(loading), {}) if whole else load_tasks_without_code(loading)
    if not code:
        check_generates(config, tasks)
    documents = splits(config, tasks)
    check_racing(config, tasks)
    survey = survey_of(loading)
    check_written(config.score_as, survey)
    pool = Pool.outline(survey)
    searched = {label: part.search for label, part in documents.items()}
    settled = (store.noted(study, SETTLED) if study else None) or {}
    length = None if code else length_of(config, survey, tasks, searched)
    holding = holding_of(config, survey, length, settled, None if code else searched)
    space, _ = spaces(config, pool)
    asked = None if code else _asked(config, pool, tasks, searched)
    config, without = _as_learned(config, asked, searched)
    history = History(study, config) if study else None
    if history and history.documents_each:
        costs_and_time = _so_far(history)
    elif code:
        costs_and_time = []
    else:
        costs_and_time = _time(config, pool, holding, tasks, searched, begun)
    return [
        ("run", f"{config.name} in {config.folder}"),
        *_parents(pool),
        ("candidate", _size((info.shape for info in pool.form.layout.infos), pool.layers)),
        *(
            (
                f"task {task.label}",
                f"{task.metric}, {len(documents[task.label].search)} search and {len(documents[task.label].holdout)} "
                f"holdout documents of {task.size}",
            )
            for task in tasks
        ),
        *(
            (f"task {name}", f"runs Python, {task_code.words(found)}: left alone, {_ASK}")
            for name, found in code.items()
        ),
        *_proposed(space),
        *_decomposed(_in_space(config, space, pool)),
        ("dimension", f"{space.dimension} parameters in the largest proposal"),
        ("strategies", ", then ".join(name.replace("_", " ") for name in config.search.strategies)),
        *([("soups", without)] if without else []),
        ("budget", _UNKNOWN if asked is None else _budget(config, documents, asked.prompt_tokens)),
        *costs_and_time,
        *_memory(holding),
        *([("backend", f"vllm {backend.version}, by {backend.python}")] if backend else []),
        ("batch size", _batch(config, settled, holding, scored=length is not None)),
    ]


def _batch(config: Config, settled: Mapping[str, Any], holding: Holding, scored: bool) -> str:
    rows = batch_size_of(config, settled)
    if config.batch_size != "auto":
        return f"{rows}, as the configuration says"
    if rows is not None:
        return f"{rows}, found when the run began"
    return f"found by trying, at most {holding.rows}" if scored else _UNKNOWN


def _proposed(space: Space) -> Lines:
    """The groups of tensors, or of layers, and by what they are merged."""
    if not isinstance(space, SearchSpace | StackSpace):
        return []
    return [("groups", ", ".join(group.label for group in space.groups)), ("methods", ", ".join(space.methods))]


def _asked(config: Config, pool: Pool, tasks: Sequence[Task], searched: Mapping[str, list[int]]) -> Scorer:
    """What the search documents ask, as requests; no weights are needed for that."""
    return scorer_of(config.by_lm_eval, pool.form.blueprint.empty(), pool.tokenizer, tasks, searched)


def _as_learned(config: Config, asked: Scorer | None, searched: Mapping[str, list[int]]) -> tuple[Config, str]:
    """The configuration with the optimizer that soups will have, and why it is another one than it says; empty where
    it is not, or cannot be known."""
    settings = settings_of(config)
    if asked is None or LearnedSoups.name not in config.search.strategies or settings.optimizer != "adam":
        return config, ""
    wanted = {task.task: searched[task.task] for task in config.tasks}
    scorer = asked.only(wanted)
    why = why_no_gradients(settings, wanted, lambda kind: Losses(scorer, None, kind=kind))
    if why is None:
        return config, ""
    return without_gradients(config), f"learned without gradients, by CMA-ES: {why}"


def _so_far(history: History) -> Lines:
    """Of a run that has begun: what it has cost, and what is still to come, at the speed that was measured."""
    lines = [(label, text) for label, _, text in (line.partition(": ") for line in costs(history)) if label == "cost"]
    rest = estimate(history.config, history, now=datetime.now())
    return [*lines, ("left", words_of(rest))] if rest and rest.parts else lines


def _time(
    config: Config,
    outline: Pool,
    holding: Holding,
    tasks: Sequence[Task],
    searched: Mapping[str, list[int]],
    begun: float,
) -> Lines:
    """How long the run will take, by what a few documents take with random numbers in the place of the weights; before
    it what the statistics of the models on documents take, of each strategy that goes by some.

    Args:
        begun: the clock when the checks began, which load what a run loads but for the weights.
    """
    needs = holding.needs
    room = residency(alike(needs), config.device, "device")
    if not room.possible:
        why = "not known: a base and a candidate that could be tried for it do not fit into memory here"
        return [*((f"statistics {name}", why) for name in strategies.measuring(config)), ("time", why)]
    own = "; answers are transformers', vLLM is not started for it" if config.backend else ""
    config = config.model_copy(update={"backend": None})
    engine = engine_of(imagined(outline, room.devices), config.dtype, room)
    scorer = scorer_of(config, engine.model, outline.tokenizer, tasks, searched, batch_size=holding.rows)
    learner = Learner(config, engine, scorer, outline.infos, outline.layers, searched)
    reading, writing = needs.parents / _READ, needs.candidate / _READ
    before = time.perf_counter() - begun + reading
    probe = measure(config, engine, scorer, learner, searched, before, writing, scorer.by_lm_eval())
    measured = _measured(config, learner, outline)
    rest = estimate(config, probe=probe)
    if rest is None or rest.seconds is None:
        said = "not known: the few documents that were tried could not be scored in a few seconds"
    else:
        said = (
            f"{words_of(rest)} (from a probe of a few documents with random weights, which end no answer early{own}; "
            "the run's own trials tell better)"
        )
    return [*measured, ("time", said)]


def _measured(config: Config, learner: Learner, pool: Pool) -> Lines:
    """What those statistics will take: time once, room in the run folder, and time for the merge that goes by them."""
    lines: Lines = []
    for name, measures in strategies.measuring(config).items():
        found = foreseen(learner, measures.how)
        if found is None:
            lines.append((f"statistics {name}", "not known: the few documents that were tried could not be measured"))
            continue
        method, models = methods.get(measures.method), tuple(config.models)
        said = f"about {duration(found.seconds)} once for {len(models)} models on about {found.documents} documents"
        said += f" and {_bytes(found.kept)} in the run folder"
        if method.matrices:
            solve = expected(method, method.complete({}, models, name), pool.infos, len(models))
            said += f", then about {duration(solve.each)} a candidate"
        lines.append((f"statistics {name}", said))
    return lines


def _budget(config: Config, documents: Mapping[str, Split], tokens: int) -> str:
    """What the run may cost: candidates, document evaluations and prompt tokens, what finding recipes takes on top.

    Args:
        tokens: of the prompts of all search documents.
    """
    search, searched = config.search, sum(len(part.search) for part in documents.values())
    known, counts = strategies.registered(), [len(documents[task.task].search) for task in config.tasks]
    expected = {name: known[name].cost(config, counts) for name in search.strategies}
    more = {name: cost.trials for name, cost in expected.items() if cost.trials}
    candidates = search.trials + sum(more.values())
    trials = ", ".join(known[name].trials_in_words(count) for name, count in more.items())
    text = (
        f"{search.trials} trials and {trials}, {searched} documents each: "
        f"{'at most ' * bool(config.racing)}{candidates * searched:,} document evaluations, "
        f"about {tokens * candidates:,} prompt tokens"
    )
    text += "".join(f", and {cost.words}" for cost in expected.values() if cost.words)
    limits = [f"{search.hours} h"] if search.hours is not None else []
    limits += [f"{search.documents:,} document evaluations"] if search.documents is not None else []
    return text + "".join(f"; ends after {limit}" for limit in limits)


def _parents(pool: Pool) -> Lines:
    names = ", ".join(f"{name} ({model.reference})" for name, model in pool.models.items())
    return [
        ("base", pool.base.reference),
        ("models", names),
        ("tokenizer", pool.tokens),
        *(("note", note) for note in pool.notes),
    ]


def _size(shapes: Iterable[tuple[int, ...]], layers: int) -> str:
    shapes = list(shapes)
    return f"{len(shapes)} tensors, {_numbers(shapes):,} parameters, {layers} layers"


def _numbers(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _rules(recipe: Recipe, jobs: Sequence[Job]) -> Lines:
    tensors: Counter[int] = Counter()
    parameters: Counter[int] = Counter()
    methods: dict[int, str] = {}
    alone: Counter[str] = Counter()
    for job in jobs:
        if job.info.component == TOWER and not any(rule.covers(job.info) for rule in recipe.rules):
            alone[job.step.models[0]] += 1
            continue
        position = recipe.rules.index(recipe.rule_for(job.info))
        tensors[position] += 1
        parameters[position] += _numbers([job.info.shape])
        methods[position] = f"{recipe.rules[position].method} of {', '.join(job.step.models)}"
    towers = [("towers", f"copied from {name}: {count} tensors; no rule names them") for name, count in alone.items()]
    lines = [
        (f"rule {rule.label}", f"{methods[n]}: {tensors[n]} tensors, {parameters[n]:,} parameters")
        if n in tensors
        else (f"rule {rule.label}", f"{rule.method} covers no tensor: an earlier rule takes them all")
        for n, rule in enumerate(recipe.rules)
    ]
    return [*lines, *towers]


def _in_space(config: Config, space: Space, pool: Pool) -> Iterator[tuple[Step, TensorInfo]]:
    """Each tensor with each method of matrices that the space has, as it is by default."""
    for method in space.methods.values() if isinstance(space, SearchSpace) else ():
        if method.matrices:
            models = tuple(config.models)[: method.max_models]
            step = Step(method, models, method.complete({}, models, "space.methods"))
            yield from ((step, info) for info in pool.infos)


def _decomposed(merged: Iterable[tuple[Step, TensorInfo]]) -> Lines:
    """What methods that decompose matrices will take, each with all tensors that it merges."""
    tensors: dict[str, tuple[Step, list[TensorInfo]]] = {}
    for step, info in merged:
        if step.method.matrices:
            tensors.setdefault(step.method.name, (step, []))[1].append(info)
    return [
        (f"matrices {name}", str(expected(step.method, step.parameters, infos, len(step.models))))
        for name, (step, infos) in tensors.items()
    ]


def _memory(holding: Holding, streams: bool = False) -> Lines:
    needs = holding.needs
    room = "" if holding.fits else "; that is more than there is: use fewer models or another device"
    kept = f"; statistics that some methods keep may take {_bytes(holding.kept)} more" if holding.kept else ""
    several = " (several GPUs were not measured yet)" if holding.devices.parts else ""
    sizes = f"{_bytes(needs.parents)} parents + {_bytes(needs.candidate)} candidate"
    if streams:
        kept, how = "", "parents read from their files, the result written to its own tensor by tensor"
    else:
        how = f"{holding}{several}"
    return [("memory", f"{sizes}: {how}{room or kept}")]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
