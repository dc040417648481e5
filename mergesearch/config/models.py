"""The configuration of one run, as strict models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mergesearch.config.report import ReportConfig
from mergesearch.config.search import SearchConfig
from mergesearch.config.space import SpaceConfig
from mergesearch.recipe import AVERAGE, BASE, UNION, DType, Recipe, Rule, single_rule
from mergesearch.schema import ONE_OR_MORE, Strict

# What may differ when a run folder is taken up again: the budget, the machine and the report, not the search.
RESUMABLE = (
    ("search", "trials"),
    ("search", "hours"),
    ("search", "documents"),
    ("output",),
    ("device",),
    ("batch_size",),
    ("scoring",),
    ("report", "finalists"),
    ("report", "documents"),
    ("report", "at_end"),
)


class TaskConfig(Strict):
    """One lm-eval task, or group of tasks, and its part in the objective."""

    task: str = Field(min_length=1)
    metric: str | None = Field(
        default=None,
        description="as lm-eval names it (`acc`, or `exact_match,strict-match`); default: the task's only one",
    )
    weight: float = Field(default=1.0, gt=0)
    num_fewshot: int | None = Field(default=None, ge=0, description="default: what the task says")
    limit: int | None = Field(
        default=None, ge=1, description="the most documents that the search scores a candidate on"
    )


class GuardConfig(Strict):
    """A task that no winner may get worse on; scored like the others and no part of the objective."""

    task: str = Field(min_length=1)
    metric: str | None = Field(default=None, description="as for tasks")
    num_fewshot: int | None = Field(default=None, ge=0, description="as for tasks")
    limit: int | None = Field(default=None, ge=1, description="as for tasks")
    max_drop: float = Field(ge=0, description="how much worse than the reference, in the metric's unit")
    against: Literal["base", "best"] = Field(
        default="base", description="the base, or the model that is best on this task"
    )

    def as_task(self) -> TaskConfig:
        """What is to be scored."""
        return TaskConfig(task=self.task, metric=self.metric, num_fewshot=self.num_fewshot, limit=self.limit)


class ObjectiveConfig(Strict):
    """How task scores become the one number that the study maximises.

    `raw`: the weighted mean of the metrics, lower-is-better ones negated. `parents`: each task on the scale where the
    base is 0 and the best single model is 1, then the weighted mean.
    """

    scale: Literal["raw", "parents"] = "parents"
    pareto: bool = Field(
        default=False, description="keep one objective for each task, and look for the front they trade along"
    )

    metric: str | None = Field(default=None, description="of every task that has it and names no metric of its own")
    tie_break: Literal["gold_prob"] | None = Field(
        default=None,
        description="decides between candidates that lie within a document: the probability of the right answer",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"pareto": True} if value == "pareto" else value


class RacingConfig(Strict):
    """Scoring block by block, so that a candidate that can no longer win is stopped early."""

    blocks: int = Field(
        default=16, ge=2, description="how often a candidate is looked at; the blocks of documents grow"
    )
    error: float = Field(
        default=0.002,
        gt=0,
        le=0.5,
        description="a candidate is stopped once its predicted chance to win is at most this",
    )


class Config(Strict):
    """One run. See README.md for the file and `configs/` for examples."""

    name: str = Field(default="run", pattern=r"^[\w.-]+$")
    base_model: str = Field(min_length=1)
    models: dict[str, str] = Field(min_length=1)
    tasks: list[TaskConfig] = Field(min_length=1)
    include_path: Annotated[list[str], ONE_OR_MORE] = Field(default=[])
    guard: list[GuardConfig] = Field(default=[], description="tasks that no winner may get worse on")
    objective: ObjectiveConfig = ObjectiveConfig()
    holdout: float = Field(
        default=0.5, ge=0, lt=1, description="share of each task's documents that the search never sees"
    )
    space: SpaceConfig = SpaceConfig()
    # made when it is needed: the strategies, which it asks, read this file first
    search: SearchConfig = Field(default_factory=SearchConfig)
    racing: RacingConfig | None = Field(
        default=None, description="left out: every candidate is scored on all documents"
    )
    report: ReportConfig = Field(default=ReportConfig(), description="what the report on the holdout may cost")
    storage: str | None = None
    output: str | None = Field(default=None, description="the run folder; default: results/NAME")
    device: str = "auto"
    dtype: DType = "bfloat16"
    tokenizer: str = Field(
        default="base", description="`base`, `union`, or the model whose tokenizer the candidates get"
    )
    batch_size: int = Field(default=64, ge=1, description="requests at once where lm-eval's own model answers")
    scoring: Literal["auto", "lm_eval"] = Field(
        default="lm_eval",
        description="`auto`: shared prompts are computed once where the model allows it; `lm_eval`: never",
    )
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    trust_remote_code: bool = False
    allow_unrelated: bool = False

    @field_validator("models")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("_", "").replace("-", "").isalnum() or name in (BASE, AVERAGE):
                raise ValueError(
                    f"{name!r} cannot name a model: use letters, digits, - and _, and neither 'base' nor 'average'"
                )
        return value

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, value: list[TaskConfig]) -> list[TaskConfig]:
        names = [task.task for task in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"task {twice!r} is listed twice: list each task once")
        return value

    @model_validator(mode="after")
    def _guards_once(self) -> Config:
        names = [guard.task for guard in self.guard]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"guard {twice!r} is listed twice: list each task once")
        tasks = {task.task for task in self.tasks}
        for guard in self.guard:
            own = next((key for key in ("metric", "num_fewshot", "limit") if getattr(guard, key) is not None), None)
            if own and guard.task in tasks:
                raise ValueError(
                    f"guard {guard.task!r} sets {own}, and the same task is in tasks, where it is scored: set it there"
                )
        return self

    @model_validator(mode="after")
    def _tokenizer_is_known(self) -> Config:
        if self.tokenizer not in (BASE, UNION, *self.models):
            raise ValueError(f"tokenizer is {self.tokenizer!r}: use base, union or one of {', '.join(self.models)}")
        return self

    @property
    def scored(self) -> list[TaskConfig]:
        """Every task that candidates are scored on: those of the objective, then the guards'."""
        tasks = {task.task for task in self.tasks}
        return [*self.tasks, *(guard.as_task() for guard in self.guard if guard.task not in tasks)]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"results/{self.name}")

    @property
    def parents(self) -> list[str]:
        """The names of the base and of every model alone, whose scores fix the scale of the objective."""
        return [BASE, *self.models]

    def recipe(self, rules: tuple[Rule, ...]) -> Recipe:
        """A recipe of this run's base, models, seed and dtype."""
        return Recipe(
            base=self.base_model,
            models=self.models,
            rules=rules,
            seed=self.search.seed,
            out_dtype=self.dtype,
            tokenizer=self.tokenizer,
        )

    @property
    def average(self) -> Recipe:
        """The plain average of all models."""
        return self.recipe(single_rule("linear", weight=1.0))

    def dump(self) -> dict[str, Any]:
        """The configuration as plain data, every default written out."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True, width=1000)

    def differences(self, other: Config) -> list[str]:
        """What keeps two configurations from sharing a run folder, as `key: ours, theirs`."""
        ours, theirs = _flat(self.dump()), _flat(other.dump())
        skipped = {".".join(path) for path in RESUMABLE}
        keys = [key for key in {**ours, **theirs} if key not in skipped and ours.get(key) != theirs.get(key)]
        return [f"{key}: {ours.get(key)!r}, there {theirs.get(key)!r}" for key in keys]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
