"""lm-eval tasks as a run uses them: loaded and checked once, their documents split into search and holdout."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval.api.metrics as lm_eval_metrics
import numpy as np
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.defaults import DEFAULT_OTHER_SEED

from mergesearch.config import LENGTH, TaskConfig
from mergesearch.errors import UserError, unknown
from mergesearch.evaluate import catalog, gold, statistics
from mergesearch.evaluate.leaves import (
    FAULTS,
    aggregations,
    directions,
    draws_from_scored,
    generates,
    is_length,
    leaves_itself_out,
    reason,
)
from mergesearch.evaluate.leaves import filters as filters_of
from mergesearch.evaluate.surroundings import lm_eval_seeds, quiet

log: logging.Logger = logging.getLogger(__name__)

# Aggregations whose standard errors have a formula, by lm-eval's function.
_AGGREGATIONS = {
    lm_eval_metrics.mean: "mean",
    lm_eval_metrics.weighted_mean: "weighted_mean",
    lm_eval_metrics.perplexity: "perplexity",
    lm_eval_metrics.weighted_perplexity: "weighted_perplexity",
    lm_eval_metrics.bits_per_byte: "bits_per_byte",
}


@dataclass(frozen=True, eq=False)
class Task:
    """One entry of the configuration's tasks: an lm-eval task, or a group of them scored as one.

    Documents are numbered from 0 to size - 1; a group's run through its tasks in `leaves` order.

    Attributes:
        label: the name in the configuration.
        metric, filter: the figure that counts, as in lm-eval's `metric,filter`, or one of `gold.METRICS`.
        aggregation: how documents become the figure, one of `statistics.AGGREGATIONS`.
        leaves: lm-eval's own Task objects by name; one, or several for a group.
        sizes: the number of documents of each leaf.
    """

    label: str
    config: TaskConfig
    metric: str
    filter: str
    higher_is_better: bool
    aggregation: str
    leaves: Mapping[str, LmEvalTask]
    sizes: Mapping[str, int]

    @property
    def size(self) -> int:
        """The number of documents."""
        return sum(self.sizes.values())

    @property
    def request_types(self) -> set[str]:
        """lm-eval's output types: multiple_choice, loglikelihood, loglikelihood_rolling, generate_until."""
        return {str(leaf.OUTPUT_TYPE) for leaf in self.leaves.values()}

    @property
    def counts_tokens(self) -> bool:
        """Whether the figure is how many tokens the answers take."""
        return is_length(next(iter(self.leaves.values())), self.metric)

    def place(self, documents: Iterable[int]) -> dict[str, list[int]]:
        """The same documents as lm-eval numbers them, ascending, for each leaf that has some."""
        documents = sorted(set(documents))
        placed, first = {}, 0
        for name, size in self.sizes.items():
            placed[name] = [document - first for document in documents if first <= document < first + size]
            first += size
        return {name: ids for name, ids in placed.items() if ids}

    def offset(self, leaf: str) -> int:
        """The number of a leaf's first document."""
        names = list(self.sizes)
        return sum(self.sizes[name] for name in names[: names.index(leaf)])

    def aggregate(self, items: Sequence[Any]) -> float:
        """lm-eval's own figure from per-document items of the metric; a group's leaves all use the mean."""
        if self.metric in gold.METRICS or self.counts_tokens:
            return statistics.mean(items)
        return aggregations(next(iter(self.leaves.values())))[self.metric](items)


@dataclass(frozen=True)
class Split:
    """Document numbers, ascending: what the search scores on, and what only the final report may."""

    search: list[int]
    holdout: list[int]


def load(
    tasks: Sequence[TaskConfig],
    include_path: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    metric: str | None = None,
    complete: bool = True,
    unsafe_code: bool = False,
) -> list[Task]:
    """The tasks of a configuration, in its order, as `lm_eval --tasks ... --include_path ...` would load them.

    Args:
        tasks: names of tasks, groups or tags, or paths of YAML files.
        include_path: folders of the user's tasks; the demo zoo's are always known.
        tokenizer: where the tokenizer is, for the few tasks that make their documents with it.
        metric: of every task that has it and whose configuration names none.
        complete: whether one of them has to have that metric.
        unsafe_code: whether tasks may run code that the model wrote, lm-eval's confirm_run_unsafe_code.

    Raises:
        UserError: an unknown task, metric or filter, one that must be chosen and is not, missing data, too few
            examples for num_fewshot, a task that needs images, sound or running generated code, a task listed twice.
    """
    metadata = {"pretrained": tokenizer, "tokenizer": tokenizer} if tokenizer else {}
    with quiet():
        manager = catalog.find([config.task for config in tasks], include_path, metadata)
        loaded = [_load(manager, config, metric, unsafe_code) for config in tasks]
    _refuse_overlaps(loaded)
    if complete:
        _refuse_metric_of_none(loaded, metric)
    return loaded


def refuse_thinking(tasks: Sequence[Task]) -> None:
    """`UserError` for a task that asks for log-likelihoods: a model that thinks first has none, as lm-eval says."""
    for task in tasks:
        if task.request_types & {"multiple_choice", "loglikelihood"}:
            raise UserError(
                f"task {task.label!r} asks for log-likelihoods, and enable_thinking is true, which is for generated "
                "answers alone: leave one of them out"
            )


def refuse_lengths(tasks: Sequence[Task], guards: Iterable[str]) -> None:
    """`UserError` for a guard on the length of answers, by its task, where the task generates none."""
    wanted = set(guards)
    for task in tasks:
        if task.label in wanted and not all(map(generates, task.leaves.values())):
            raise UserError(
                f"guard {task.label!r} is on the {LENGTH} of answers, and the task generates none: leave its metric "
                "out, or take a task that does"
            )


def split(task: Task, holdout: float, seed: int, limit: int | None = None) -> Split:
    """Which documents the search may use and which it never sees, from (seed, label, size) alone.

    Args:
        holdout: the share of all documents, in [0, 1), rounded up to whole documents; 0 keeps none back.
        limit: at most so many documents for the search; it does not change the holdout.

    Raises:
        UserError: a side that is needed has fewer than 2 documents.
    """
    # PCG64's raw stream is the same in every version of numpy
    digest = hashlib.sha256(f"{seed}\n{task.label}\n{task.size}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(task.size)
    order = np.argsort(keys, kind="stable").tolist()
    kept_back = math.ceil(round(holdout * task.size, 9))
    parts = Split(search=sorted(order[kept_back:][:limit]), holdout=sorted(order[:kept_back]))
    for side, documents, needed in (("search", parts.search, True), ("holdout", parts.holdout, holdout > 0)):
        if needed and len(documents) < 2:
            raise UserError(_too_few(task, side, len(documents), holdout, limit))
    return parts


def _too_few(task: Task, side: str, left: int, holdout: float, limit: int | None) -> str:
    limited = side == "search" and limit is not None and limit < 2
    cause = f"limit {limit}" if limited else f"holdout {holdout}"
    remedy = "raise the limit" if limited else "change holdout (0 for none), or take a task with more documents"
    left_over = f"{task.size} documents, and {cause} leaves {left} for the {side} (2 are needed)"
    return f"task {task.label!r} has {left_over}: {remedy}"


def _load(manager: Any, config: TaskConfig, default: str | None, unsafe_code: bool) -> Task:
    try:
        with lm_eval_seeds():
            return _built(manager.load([config.task]), config, default, unsafe_code)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(_cannot_load(config.task, manager, error)) from error


def _built(built: Mapping[str, Any], config: TaskConfig, default: str | None, unsafe_code: bool) -> Task:
    leaves = dict(built["tasks"])
    sizes = {name: len(leaf.eval_docs) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        _refuse_unsuitable(name, leaf, unsafe_code)
        _set_fewshot(name, leaf, config)
    _set_generation(leaves, config)
    metric, chosen_filter = _figure(config, next(iter(leaves.values())), default)
    task = Task(
        label=config.task,
        config=config,
        metric=metric,
        filter=chosen_filter,
        aggregation=_aggregation(config, leaves, metric, chosen_filter),
        higher_is_better=_direction(config, leaves, metric),
        leaves=leaves,
        sizes=sizes,
    )
    _refuse_unweighted(task, built.get("groups", {}))
    return task


def _cannot_load(name: str, manager: Any, error: BaseException) -> str:
    entry = manager.task_index.get(name)
    where = f" in {entry.yaml_path}" if entry is not None and entry.yaml_path else ""
    if isinstance(error, FileNotFoundError):
        return (
            f"task {name!r}: a data file is missing ({error}): check dataset_path and data_files{where}; "
            "a relative path counts from the working directory"
        )
    what = f"task {name!r} cannot be loaded ({reason(error)})"
    return f"{what}: check its configuration{where} and that its data can be reached"


def _refuse_unsuitable(name: str, leaf: LmEvalTask, unsafe_code: bool) -> None:
    if getattr(leaf, "UNSAFE_CODE", False) and not unsafe_code:
        raise UserError(
            f"task {name!r} runs code that the model wrote (unsafe_code): set confirm_run_unsafe_code to true where "
            "that can do no harm, or leave the task out"
        )
    if getattr(leaf, "MULTIMODAL", False):
        raise UserError(f"task {name!r} needs images or sound, which is not supported: choose a task of text alone")


def _set_generation(leaves: Mapping[str, LmEvalTask], config: TaskConfig) -> None:
    """gen_kwargs as lm_eval.simple_evaluate sets them; into a copy, since loaded tasks share what their YAML says."""
    if not config.gen_kwargs:
        return
    generating = [leaf for leaf in leaves.values() if generates(leaf)]
    if not generating:
        raise UserError(f"task {config.task!r} generates nothing, so gen_kwargs says nothing of it: leave that out")
    for leaf in generating:
        kwargs = {**(leaf.get_config("generation_kwargs") or {}), **copy.deepcopy(config.gen_kwargs)}
        leaf.set_config(key="generation_kwargs", value=kwargs)


def _set_fewshot(name: str, leaf: LmEvalTask, config: TaskConfig) -> None:
    """num_fewshot as lm_eval.simple_evaluate sets it, which lets nothing replace a task's own 0."""
    own, asked = leaf.get_config("num_fewshot"), config.num_fewshot
    if own == 0 and asked:
        raise UserError(
            f"task {name!r} sets num_fewshot to 0 itself and lm-eval keeps that: remove num_fewshot {asked} for it, "
            "or remove the 0 from the task's YAML"
        )
    if asked is not None or own is None:
        leaf.set_config(key="num_fewshot", value=asked or 0)
    leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    _check_fewshot(name, leaf)


def _check_fewshot(name: str, leaf: LmEvalTask) -> None:
    shots, sampler = leaf.get_config("num_fewshot") or 0, getattr(leaf, "sampler", None)
    if not shots or sampler is None:
        return
    examples, scored = len(sampler.df), draws_from_scored(leaf)
    # where it leaves out the document that is asked, lm-eval draws one more; where it does not, one more is what keeps
    # a document out of its own prompt at least now and then
    needed = shots + (scored or leaves_itself_out(leaf))
    if examples < needed:
        why = ", which are the documents that are scored and each needs others than itself," if scored else ","
        raise UserError(
            f"task {name!r} has {examples} few-shot examples{why} and num_fewshot {shots} needs {needed}: "
            f"lower num_fewshot to {max(0, examples - needed + shots)}"
        )
    if scored and not leaves_itself_out(leaf):
        log.warning(
            "task %r: lm-eval draws its few-shot examples from the documents that it scores, so that some stand in "
            "their own prompt; name another split as its fewshot_split",
            name,
        )


def _figure(config: TaskConfig, leaf: LmEvalTask, default: str | None) -> tuple[str, str]:
    """The metric and the filter that the configuration means, where the task leaves no doubt."""
    metrics, filters = list(aggregations(leaf)), filters_of(leaf)
    wanted = config.metric or (default if _has(leaf, default) else None)
    metric, _, chosen = (part.strip() for part in (wanted or "").partition(","))
    place = f"task {config.task!r}"
    if metric in gold.METRICS and metric not in metrics:
        return _gold_figure(metric, chosen, leaf, place)
    if metric == LENGTH and metric not in metrics:
        return _length_figure(chosen, leaf, place)
    if not metric and len(metrics) != 1:
        raise UserError(f"{place} has several metrics ({', '.join(metrics)}): choose one, as in `metric: {metrics[0]}`")
    metric = metric or metrics[0]
    if metric not in metrics:
        raise unknown("metric", metric, metrics, place)
    if not chosen and len(filters) != 1:
        each = " or ".join(f"`{metric},{name}`" for name in filters)
        raise UserError(f"{place} gives {metric} after several filters: choose one, write {each} as its metric")
    chosen = chosen or filters[0]
    if chosen not in filters:
        raise unknown("filter", chosen, filters, f"{place}, metric {config.metric!r}")
    return metric, chosen


def _has(leaf: LmEvalTask, metric: str | None) -> bool:
    name = (metric or "").partition(",")[0].strip()
    return name in aggregations(leaf) or (name in gold.METRICS and gold.is_answered(leaf)) or is_length(leaf, name)


def _gold_figure(metric: str, chosen: str, leaf: LmEvalTask, place: str) -> tuple[str, str]:
    if not gold.is_answered(leaf):
        own = ", ".join(aggregations(leaf))
        raise UserError(
            f"{place} has no {metric}: its answers do not hold the probability of what is right (output_type "
            f"{leaf.OUTPUT_TYPE}{', process_results of its own' if callable(leaf.config.process_results) else ''}): "
            f"choose one of its metrics ({own})"
        )
    if chosen:
        raise UserError(f"{place}: {metric} is taken before any filter: write `metric: {metric}`")
    return metric, filters_of(leaf)[0]


def _length_figure(chosen: str, leaf: LmEvalTask, place: str) -> tuple[str, str]:
    if not generates(leaf):
        raise UserError(
            f"{place} has no {LENGTH}: its answers are no generated texts (output_type {leaf.OUTPUT_TYPE}): choose one "
            f"of its metrics ({', '.join(aggregations(leaf))})"
        )
    if chosen:
        raise UserError(f"{place}: {LENGTH} is taken before any filter: write `metric: {LENGTH}`")
    return LENGTH, filters_of(leaf)[0]


def _refuse_metric_of_none(tasks: Sequence[Task], metric: str | None) -> None:
    name = (metric or "").partition(",")[0].strip()
    if metric and all(task.metric != name for task in tasks):
        raise unknown("metric", name, dict.fromkeys(task.metric for task in tasks), "objective.metric, for no task")


def _direction(config: TaskConfig, leaves: Mapping[str, LmEvalTask], metric: str) -> bool:
    if metric in gold.METRICS:
        return True
    if all(is_length(leaf, metric) for leaf in leaves.values()):
        return False
    said = {directions(leaf).get(metric) for leaf in leaves.values()}
    if len(said) != 1 or None in said:
        raise UserError(
            f"task {config.task!r} does not say whether a higher {metric} is better: "
            "add higher_is_better to the metric in its YAML"
        )
    return bool(said.pop())


def _aggregation(config: TaskConfig, leaves: Mapping[str, LmEvalTask], metric: str, chosen_filter: str) -> str:
    if metric in gold.METRICS and all(gold.is_answered(leaf) for leaf in leaves.values()):
        return "mean"
    if all(is_length(leaf, metric) for leaf in leaves.values()):
        return "mean"
    for name, leaf in leaves.items():
        if metric not in aggregations(leaf) or chosen_filter not in filters_of(leaf):
            raise UserError(
                f"group {config.task!r}: its task {name!r} has no {metric},{chosen_filter}: list the tasks one by one"
            )
        if not callable(aggregations(leaf)[metric]):
            raise UserError(f"task {name!r} does not say how {metric} is aggregated: add aggregation to it in its YAML")
    kinds = {_AGGREGATIONS.get(aggregations(leaf)[metric], statistics.JACKKNIFE) for leaf in leaves.values()}
    if len(leaves) > 1 and kinds != {"mean"}:
        raise UserError(
            f"group {config.task!r} cannot be scored on {metric}, which is no mean over documents: "
            f"list its tasks one by one ({', '.join(leaves)})"
        )
    return kinds.pop()


def _refuse_unweighted(task: Task, groups: Mapping[str, Any]) -> None:
    for aggregate in getattr(groups.get(task.label), "aggregate_metric_list", None) or []:
        if aggregate.metric == task.metric and not aggregate.weight_by_size:
            raise UserError(
                f"group {task.label!r} averages {task.metric} over its tasks and not over documents (weight_by_size: "
                f"false), which is not supported: list its tasks one by one ({', '.join(task.leaves)})"
            )


def _refuse_overlaps(tasks: Sequence[Task]) -> None:
    owner: dict[str, str] = {}
    for task in tasks:
        for leaf in task.leaves:
            if leaf in owner:
                raise UserError(f"task {leaf!r} is in {owner[leaf]!r} and in {task.label!r}: list it once")
            owner[leaf] = task.label
