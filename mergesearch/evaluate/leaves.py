"""What every lm-eval task in use has, and lm-eval's base class of tasks leaves without a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task as LmEvalTask

from mergesearch.config import LENGTH

# what a task's own code may raise; sys.exit in it must not end the run
FAULTS: tuple[type[BaseException], ...] = (Exception, SystemExit)


def reason(fault: BaseException) -> str:
    """What a task's code raised, in a line."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text[:500]}" if text else type(fault).__name__


def aggregations(leaf: LmEvalTask) -> Mapping[str, Callable[[Sequence[Any]], float]]:
    """How the documents' values become the figure, by metric."""
    return cast(Any, leaf).aggregation()


def directions(leaf: LmEvalTask) -> Mapping[str, bool]:
    """Whether more is better, by metric, as far as the task says so."""
    return cast(Any, leaf).higher_is_better()


def choices(leaf: LmEvalTask, document: Mapping[str, Any]) -> list[str]:
    """The choices of a document of a multiple-choice task."""
    return cast(Any, leaf).doc_to_choice(document)


def generates(leaf: LmEvalTask) -> bool:
    """Whether a task's answers are generated texts."""
    return str(leaf.OUTPUT_TYPE) == "generate_until"


def is_length(leaf: LmEvalTask, metric: str) -> bool:
    """Whether a metric counts the tokens of answers; a task's own metric of that name comes first."""
    return metric == LENGTH and LENGTH not in aggregations(leaf) and generates(leaf)


def filters(leaf: LmEvalTask) -> list[str]:
    """The names of the task's filters."""
    return [ensemble.name for ensemble in leaf._filters]


def draws_from_scored(leaf: LmEvalTask) -> bool:
    """Whether few-shot examples are drawn from the very documents that are scored."""
    settings, config = cast(Any, leaf).fewshot_cfg, cast(Any, leaf).config
    if settings.split is None and settings.samples is not None:
        return False
    # lm-eval's order where the task names none
    split = settings.split or config.training_split or config.validation_split or config.test_split
    return split == (config.test_split or config.validation_split)


def leaves_itself_out(leaf: LmEvalTask) -> bool:
    """Whether lm-eval draws one example more than it shows, and drops the document that is asked."""
    listed = isinstance(cast(Any, leaf).sampler, FirstNSampler) and not draws_from_scored(leaf)
    return cast(Any, leaf).fewshot_cfg.split == cast(Any, leaf).config.test_split and not listed
