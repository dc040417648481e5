"""One entry of `tasks`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mergesearch.schema import Strict


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
