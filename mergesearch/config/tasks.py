"""One entry of `tasks`, and what other lists of tasks share with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from mergesearch.schema import Strict

# what a task that generates can be scored on beside its own metrics: the tokens that an answer took, fewer are better
LENGTH = "length"


class TaskConfig(Strict):
    """One lm-eval task, or group of tasks, and its part in the objective."""

    task: str = Field(
        min_length=1, description="a task or a group of tasks that lm-eval knows, or that `include_path` holds"
    )
    metric: str | None = Field(
        default=None,
        description="as lm-eval names it (`acc`, or `exact_match,strict-match`), `gold_prob` or `gold_logprob`, the "
        "probability of the right answer, or `length`, the number of tokens that an answer takes (fewer are better); "
        "default: the task's only one",
    )
    # far beyond any use, and far from where a mean of scores overflows or vanishes
    weight: float = Field(default=1.0, ge=1e-6, le=1_000_000, description="its part in the mean of the tasks")
    num_fewshot: int | None = Field(default=None, ge=0, description="default: what the task says")
    limit: int | None = Field(
        default=None, ge=1, description="the most documents that the search scores a candidate on"
    )
    gen_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="how answers are generated, as the option of `lm_eval`, over what the task says: `max_gen_toks`, "
        "`until`, `temperature`, `do_sample` and what else transformers takes",
    )


class NamedTask(Strict):
    """A task that is no part of the objective; what it is for is said by who names it."""

    task: str = Field(min_length=1, description="as for tasks")
    metric: str | None = Field(default=None, description="as for tasks")
    num_fewshot: int | None = Field(default=None, ge=0, description="as for tasks")

    def as_task(self) -> TaskConfig:
        """What is to be scored."""
        keys = {name: getattr(self, name) for name in TaskConfig.model_fields if hasattr(self, name)}
        return TaskConfig(**keys)


def check_once(entries: Iterable[TaskConfig | NamedTask], what: str = "task") -> None:
    """`ValueError` where a task is listed twice.

    Args:
        what: an entry is called.
    """
    names = [entry.task for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{what} {twice!r} is listed twice: list each task once")
