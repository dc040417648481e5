"""What every lm-eval task in use has, and lm-eval's base class of tasks leaves without a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from lm_eval.api.task import Task as LmEvalTask


def aggregations(leaf: LmEvalTask) -> Mapping[str, Callable[[Sequence[Any]], float]]:
    """How the documents' values become the figure, by metric."""
    return cast(Any, leaf).aggregation()


def directions(leaf: LmEvalTask) -> Mapping[str, bool]:
    """Whether more is better, by metric, as far as the task says so."""
    return cast(Any, leaf).higher_is_better()


def choices(leaf: LmEvalTask, document: Mapping[str, Any]) -> list[str]:
    """The choices of a document of a multiple-choice task."""
    return cast(Any, leaf).doc_to_choice(document)


def filters(leaf: LmEvalTask) -> list[str]:
    """The names of the task's filters."""
    return [ensemble.name for ensemble in leaf._filters]


def fewshot_split(leaf: LmEvalTask) -> str | None:
    """The split that few-shot examples are drawn from; None where the task lists them itself."""
    return cast(Any, leaf).fewshot_cfg.split
