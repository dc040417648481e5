"""`report`: what `mergesearch report` may cost, and whether a run ends with it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from mergesearch.config.tasks import NamedTask, check_once
from mergesearch.schema import Strict


class BenchmarkConfig(NamedTask):
    """A task that only the report scores on."""

    limit: int | None = Field(default=None, ge=2, description="the most documents, drawn by the seed; default: all")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


class ReportConfig(Strict):
    """Who is scored on the holdout, and on how much of it. It may differ whenever a run is reported on."""

    finalists: int = Field(
        default=3, ge=1, description="how many of the best proposals are scored beside the baselines"
    )
    documents: int | None = Field(
        default=None,
        ge=2,
        description="the most holdout documents of each task, drawn by the seed; default: all",
    )
    at_end: bool = Field(default=False, description="whether `mergesearch run` ends with the report")
    examples: int = Field(
        default=0,
        ge=0,
        le=1_000,
        description="how many holdout documents on which the winner and the best single model differ are asked again, "
        "so that the page shows both answers",
    )
    tasks: list[BenchmarkConfig] = Field(
        default=[],
        description="tasks that the search never uses, on which the report scores winner, finalists and parents too; "
        "a name, or `{task, metric, num_fewshot, limit}`",
    )

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, value: list[BenchmarkConfig]) -> list[BenchmarkConfig]:
        check_once(value)
        return value
