"""The configuration of one run, as strict models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from mergesearch.config import storage as storages
from mergesearch.config.backend import BackendConfig
from mergesearch.config.racing import RacingConfig
from mergesearch.config.report import ReportConfig
from mergesearch.config.search import SearchConfig
from mergesearch.config.served import Form, check_form
from mergesearch.config.space import SpaceConfig
from mergesearch.config.tasks import LENGTH, NamedTask, TaskConfig, check_once
from mergesearch.config.track import TrackConfig
from mergesearch.errors import without_passwords
from mergesearch.recipe import AVERAGE, BASE, UNION, DType, Recipe, Rule, single_rule
from mergesearch.schema import ONE_OR_MORE, Strict

# What may differ when a run folder is taken up again: the budget, the machine and the report, not the search.
RESUMABLE = (
    ("search", "trials"),
    ("search", "hours"),
    ("search", "documents"),
    ("search", "trial_timeout"),
    ("search", "patience"),
    ("search", "patience", "trials"),
    ("search", "patience", "documents"),
    ("on_best",),
    ("on_end",),
    ("search", "study_ends"),
    ("output",),
    ("storage_proxy",),
    ("device",),
    ("memory",),
    ("batch_size",),
    ("report", "finalists"),
    ("report", "documents"),
    ("report", "at_end"),
    ("report", "examples"),
    ("report", "tasks"),
    ("trust_tasks",),
    ("track",),
    ("confirm_run_unsafe_code",),
    ("backend", "python"),
    ("backend", "gpu_memory"),
)


# far beyond any use
_MOST_AT_ONCE = 1_000_000


class GuardConfig(NamedTask):
    """A task that no winner may get worse on; scored like the others and no part of the objective."""

    limit: int | None = Field(default=None, ge=1, description="as for tasks")
    gen_kwargs: dict[str, Any] | None = Field(default=None, description="as for tasks")
    max_drop: float = Field(ge=0, le=1_000_000, description="how much worse than the reference, in the metric's unit")
    against: Literal["base", "best"] = Field(
        default="base", description="the base, or the model that is best on this task"
    )


class ObjectiveConfig(Strict):
    """How task scores become the one number that the study maximises.

    `raw`: the weighted mean of the metrics, lower-is-better ones negated. `parents`: each task on the scale where the
    base is 0 and the best single model is 1, then the weighted mean.
    """

    scale: Literal["raw", "parents"] = Field(
        default="parents",
        description="`parents`: each task on the scale where the base is 0 and the best single model 1, then the "
        "weighted mean; `raw`: the weighted mean of the metrics, lower-is-better ones negated. A task whose best "
        "single model is not better than the base keeps its raw metric, and the table says so",
    )
    pareto: bool = Field(
        default=False,
        description="keep one objective for each task, and look for the front they trade along; `objective: pareto` "
        "for short",
    )

    worst: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="the share that the worst task has in the objective, the mean has the rest: `{worst: 0.5}` where "
        "no skill may be given up for the others. Learned soups go by the mean, and are chosen by both",
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


class Config(Strict):
    """One run. See docs/configuration.md for the file and `configs/` for examples.

    >>> from mergesearch import Config
    >>> config = Config(base_model="zoo:base", models={"order": "zoo:order"}, tasks=[{"task": "zoo_order"}])
    >>> config.search.trials, config.holdout
    (40, 0.5)
    """

    name: str = Field(
        default="run", max_length=200, description="names the study, and the run folder where `output` does not"
    )
    base_model: str = Field(
        min_length=1,
        description="the checkpoint that the models were fine-tuned from: a folder with safetensors, a hub id "
        "(`owner/name` or `owner/name@revision`), or `zoo:NAME`",
    )
    models: dict[str, str] = Field(
        min_length=1,
        description="the fine-tuned models, each under a name of your choice: checkpoints or LoRA adapters, given as "
        "the base is, or `MODEL+ADAPTER`",
    )
    tasks: list[TaskConfig] = Field(min_length=1, description="what is maximised")
    include_path: Annotated[list[str], ONE_OR_MORE] = Field(
        default=[],
        description="folders with lm-eval tasks of your own, one or a list. Python that their YAML names is run: see "
        "`trust_tasks`",
    )
    guard: list[GuardConfig] = Field(
        default=[], description="tasks that no winner may get worse on; scored like tasks and no part of the objective"
    )
    objective: ObjectiveConfig = Field(
        default=ObjectiveConfig(), description="how task scores become the one number that is maximised"
    )
    holdout: float = Field(
        default=0.5, ge=0, lt=1, description="share of each task's documents that the search never sees"
    )
    space: SpaceConfig = Field(default=SpaceConfig(), description="what the study may propose")
    # made when it is needed: the strategies, which it asks, read this file first
    search: SearchConfig = Field(
        default_factory=SearchConfig, description="which strategies are run, in what order, and how long"
    )
    racing: RacingConfig | None = Field(
        default=None,
        description="score proposals block by block and stop those that can no longer win; left out: every candidate "
        "is scored on all documents",
    )
    storage: str | None = Field(
        default=None,
        repr=False,
        description="the URL of a database that Optuna takes, for workers on several hosts, who share the run folder "
        "too, so that one can take up what another left; `${NAME}` in it stands for a variable of the environment, as "
        "in `postgresql://me:${PGPASSWORD}@host/runs`; left out: SQLite in the run folder",
    )
    storage_proxy: str | None = Field(
        default=None,
        description="`HOST:PORT` of a `mergesearch proxy` before the storage, for more workers than a database takes "
        "connections (some hundred): trials are read and written through it (`pip install 'mergesearch[proxy]'`)",
    )
    artifacts: str | None = Field(
        default=None,
        description="where the files that trials leave (scores of documents, how far a soup or a race is) are kept for "
        "hosts that share no run folder: `s3://BUCKET/PREFIX` (`pip install 'mergesearch[s3]'`), "
        "`gs://BUCKET/PREFIX` (`mergesearch[gcs]`), or a folder that all reach, relative to where the command is run; "
        "left out: the run folder alone",
    )
    report: ReportConfig = Field(default=ReportConfig(), description="what the report on the holdout may cost")
    on_best: str | None = Field(
        default=None,
        description="a command for the shell, run whenever the search has found a better candidate, with the news in "
        "its environment: `$MERGESEARCH_VERDICT`, `_TRIAL`, `_OBJECTIVE`, `_METHOD`, `_NAME`, `_RUN`",
    )
    on_end: str | None = Field(
        default=None,
        description="likewise, when the run ends, also by an error or an interruption; `$MERGESEARCH_STATUS` is its "
        "exit status; of processes of `mergesearch worker` by the last one, once no trial is left",
    )
    track: Annotated[list[TrackConfig], ONE_OR_MORE] = Field(
        default=[],
        description="trackers with a row for each trial: one or a list, a name or `{to, project, where}`",
    )
    output: str | None = Field(default=None, description="the run folder; default: results/NAME")
    device: str = Field(default="auto", description="where candidates live: `auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: DType = Field(
        default="bfloat16", description="of the candidates, as they are scored and as they are exported"
    )
    tokenizer: str = Field(
        default="base", description="`base`, `union`, or the model whose tokenizer the candidates get"
    )
    memory: Literal["auto", "device", "pinned", "mapped"] = Field(
        default="auto",
        description="where the base and the models are held while candidates are made: `device`, beside the candidate; "
        "`pinned`, in host memory that a GPU copies from; `mapped`, in their files; `auto`: the first of these that "
        "has room, by what is free",
    )
    batch_size: int | Literal["auto"] = Field(
        default="auto",
        description="requests at once where lm-eval's own model answers; `auto`: as many as fit, found by trying when "
        "the run begins and kept for all its workers, at most 64 on a CPU; a number up to 1,000,000 is taken as it is",
    )
    scoring: Literal["auto", "lm_eval"] = Field(
        default="auto",
        description="`auto`: the search computes a prompt that requests share once, wherever that is as exact as "
        "lm-eval's own way and saves something, and lm-eval's own model scores the parents, the average and the winner "
        "once more at the end, so that the `lm_eval` command gives the figures in the model card; `lm_eval`: lm-eval's "
        "own model answers everything",
    )
    backend: BackendConfig | None = Field(
        default=None,
        description="`vllm`: greedy answers of tasks that generate come from a vLLM engine, which takes each "
        "candidate's weights over in place (docs/vllm.md); `{name, python, gpu_memory, options}` says where it is and "
        "what it is told; left out: transformers generates them",
    )
    score_as: Form | None = Field(
        default=None,
        description="the form that will be served. `int8`, `int4`, `fp8`: linear layers but the head have weights in 8 "
        "or 4 bits, by torchao (`pip install 'mergesearch[torchao]'`); candidates are scored in it, the export carries "
        "it beside the merge, and the report shows the winner in both; `int8` has a scale for each row, `int4` for "
        "each 32 numbers, `fp8` for each tensor. `gguf:TYPE`: a file for llama.cpp (`pip install "
        "'mergesearch[gguf]'`); candidates are scored as they are merged, the export carries the file beside the "
        "merge, and the report shows the finalists in both; of llama.cpp's types, those that need no importance "
        "matrix. Default: as they are merged",
    )
    apply_chat_template: bool = Field(default=False, description="as the option of `lm_eval`")
    fewshot_as_multiturn: bool = Field(default=False, description="as the option of `lm_eval`")
    system_instruction: str | None = Field(default=None, description="as the option of `lm_eval`")
    enable_thinking: bool | None = Field(
        default=None,
        description="as lm-eval's model argument: what the chat template of a reasoning model is told; `true` needs "
        "`think_end_token`, and tasks that ask for log-likelihoods are refused with it",
    )
    think_end_token: str | int | None = Field(
        default=None, description="as lm-eval's model argument: the answer is what follows it, as in `</think>`"
    )
    attn_implementation: str | None = Field(
        default=None,
        description="how the models attend while they are scored, as transformers names it: `sdpa`, `eager`, "
        "`flash_attention_2`; default: what transformers chooses",
    )
    confirm_run_unsafe_code: bool = Field(
        default=False,
        description="as the option of `lm_eval`: tasks that run what a model wrote (humaneval, mbpp) are refused until "
        "this is true. The code runs as you, on this machine: do that where it can do no harm",
    )
    trust_remote_code: bool = Field(default=False, description="run code from the models' folders")
    trust_tasks: bool | None = Field(
        default=None,
        description="tasks of your own may run Python (`!function` in their YAML). `false`: such a task is refused "
        "before anything is loaded; left out: it is run, with a line that names file and function, and `check` leaves "
        "it alone; `true`: `check` runs it too",
    )
    allow_unrelated: bool = Field(default=False, description="accept models that were hardly fine-tuned from the base")

    @model_validator(mode="before")
    @classmethod
    def _something_is_scored(cls, value: Any) -> Any:
        if isinstance(value, dict) and "predict_only" in value:
            raise ValueError(
                "predict_only leaves out the figures, and a search goes by them: leave it out, and score the winner "
                "with `lm_eval --predict_only` by hand"
            )
        return value

    @model_validator(mode="after")
    def _thinking_has_an_end(self) -> Config:
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError(
                "enable_thinking is true and there is no think_end_token, which lm-eval needs to find the answer: set "
                "it, for example to </think>"
            )
        return self

    @model_validator(mode="after")
    def _backend_goes_with_the_rest(self) -> Config:
        if self.backend is None:
            return self
        what = ""
        if self.scoring == "lm_eval":
            what = "scoring is lm_eval, by which lm-eval's own model answers everything: set scoring: auto"
        elif self.score_as is not None:
            what = f"score_as is {self.score_as}, which its engine would not be told of: leave score_as out"
        elif self.space.stack is not None:
            what = "space.stack changes the number of layers, which its engine cannot: leave space.stack out"
        elif isinstance(self.think_end_token, int):
            what = f"think_end_token is {self.think_end_token}, and answers are texts there: give the token's text"
        if what:
            raise ValueError(f"backend is vllm, and {what}, or leave backend out")
        return self

    @field_validator("score_as", mode="before")
    @classmethod
    def _a_form(cls, form: object) -> object:
        check_form(form)
        return form

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+", value) or not value.strip("."):
            raise ValueError(f"{value!r} cannot name a run folder: use letters, digits, -, _ and ., and not dots alone")
        return value

    @field_validator("models")
    @classmethod
    def _plain_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("_", "").replace("-", "").isalnum() or name in (BASE, AVERAGE):
                raise ValueError(
                    f"{name!r} cannot name a model: use letters, digits, - and _, and neither 'base' nor 'average'"
                )
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _auto_or_a_count(cls, value: Any) -> Any:
        # one sentence for both kinds
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (whole and 1 <= value <= _MOST_AT_ONCE):
            shown = repr(value)
            shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
            raise ValueError(f"{shown}: use auto, or a whole number in [1, {_MOST_AT_ONCE}]")
        return value

    @field_validator("storage")
    @classmethod
    def _storage_is_a_url(cls, value: str | None) -> str | None:
        return None if value is None else storages.check_url(value)

    @field_validator("artifacts")
    @classmethod
    def _artifacts_have_a_place(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, there, rest = value.partition("://")
        if there and scheme not in ("s3", "gs"):
            raise ValueError(f"{value!r} is no store: give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder")
        if not (rest if there else value).strip("/"):
            raise ValueError(f"{value!r} names nothing: give s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder")
        return value if there else str(Path(value).expanduser().absolute())

    @field_validator("storage_proxy")
    @classmethod
    def _proxy_is_an_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        storages.address(value)
        storage = info.data.get("storage")
        if storage is None or storage.startswith("sqlite"):
            raise ValueError(
                "it stands before a database on a server: set storage to one (postgresql://USER@HOST/NAME), or leave "
                "storage_proxy out"
            )
        return value

    @field_serializer("storage")
    def _storage_without_password(self, value: str | None) -> str | None:
        # whatever is kept or shown of a configuration goes through here
        return None if value is None else without_passwords(value)

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, value: list[TaskConfig]) -> list[TaskConfig]:
        check_once(value)
        return value

    @model_validator(mode="after")
    def _guards_once(self) -> Config:
        check_once(self.guard, "guard")
        tasks = {task.task for task in self.tasks}
        for guard in self.guard:
            keys = ("num_fewshot", "limit", "gen_kwargs")
            # the tokens of answers are counted beside whatever the task goes by
            keys = keys if guard.metric == LENGTH else ("metric", *keys)
            own = next((key for key in keys if getattr(guard, key) is not None), None)
            if own and guard.task in tasks:
                raise ValueError(
                    f"guard {guard.task!r} sets {own}, and the same task is in tasks, where it is scored: set it there"
                )
        return self

    @model_validator(mode="after")
    def _worst_is_one_number(self) -> Config:
        worst = self.objective.worst
        if worst and self.objective.pareto:
            raise ValueError(f"objective.worst is {worst:g}, and pareto keeps one objective for each task: drop one")
        if worst and self.racing:
            raise ValueError(
                f"objective.worst is {worst:g}, and racing compares means of documents, which the worst task is not: "
                "leave out racing or worst"
            )
        return self

    @model_validator(mode="after")
    def _report_has_tasks_of_its_own(self) -> Config:
        scored = {task.task for task in self.scored}
        for task in self.report.tasks:
            if task.task in scored:
                raise ValueError(
                    f"report.tasks names {task.task!r}, which the search scores on: the report has it by its holdout"
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
    def by_lm_eval(self) -> Config:
        """The same configuration, by which lm-eval's own model answers everything."""
        return self.model_copy(update={"scoring": "lm_eval", "backend": None})

    @property
    def model_args(self) -> dict[str, Any]:
        """What lm-eval's model is told beside the checkpoint, as its `--model_args`; None where nothing is set."""
        names = ("attn_implementation", "enable_thinking", "think_end_token")
        return {name: getattr(self, name) for name in names}

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
        if storages.same(self.storage, other.storage):
            skipped.add("storage")
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
