"""The configuration of one run: a YAML file, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema

from mergesearch import registry
from mergesearch.errors import UserError, nearest
from mergesearch.paths import absolute, absolute_path, absolute_reference
from mergesearch.recipe import AVERAGE, BASE, UNION, DType, Recipe, Rule, single_rule
from mergesearch.schema import ONE_OR_MORE, Strict, parse_yaml, read_yaml, validate

# What may differ when a run folder is taken up again: the budget and the machine, not the search.
RESUMABLE = (
    ("search", "trials"),
    ("search", "hours"),
    ("search", "documents"),
    ("output",),
    ("device",),
    ("batch_size",),
    ("scoring",),
)
# stands for the strategies that say so, in their order
AUTO = "auto"
T = TypeVar("T")


def _as_range(value: Any) -> Any:
    """A single number is a range of one value: the parameter is fixed, not searched."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value, value)
    return value


Range = Annotated[tuple[float, float], BeforeValidator(_as_range)]


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


class Selector(Strict):
    """Some of the tensors: what `layers` and `components` both select; left out, each selects everything."""

    layers: tuple[int, int] | None = Field(default=None, description="first and last layer, both included")
    components: list[str] | None = None


class Freeze(Selector):
    """Tensors that the search leaves as one of its parents has them."""

    at: str = Field(default="base", description="`base`, `average` or a model's name")


class Narrow(Selector):
    """Ranges of their own for some of the tensors: further keys are method parameters, as in `space`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    def ranges(self) -> dict[str, tuple[float, float]]:
        return _ranges(self.model_extra or {})


class StackConfig(Strict):
    """The search for a stack: which model's layer stands at each depth, how often, and how loud."""

    repeats: tuple[int, int] = Field(
        default=(1, 2), description="the fewest and the most times a layer is there; 0 skips it"
    )
    scale: Range = Field(default=(1.0, 1.0), description="of what a repeated layer adds to the residual stream")
    base: bool = Field(default=True, description="whether the base's layers may be taken too")

    @model_validator(mode="after")
    def _in_order(self) -> StackConfig:
        low, high = self.repeats
        if not 0 <= low <= high or high < 1:
            raise ValueError(f"repeats: [{low}, {high}]: give the fewest and the most, as in [1, 2]")
        return self


class SpaceConfig(Strict):
    """What the study may propose. Further keys are ranges of method parameters: `t: [0.2, 0.8]`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    methods: list[str] = Field(default=["linear", "task_arithmetic", "ties", "dare_ties"], min_length=1)
    layer_groups: int = Field(default=1, ge=1, description="consecutive ranges of layers with parameters of their own")
    components: list[str] = Field(
        default=["all"],
        min_length=1,
        description="each group of layers splits into these; `other`: all that is not named",
    )
    method_per: Literal["recipe", "group"] = "recipe"
    depth: Literal["groups", "control_points", "split"] = Field(
        default="groups",
        description="how parameters vary over depth: by groups of layers; interpolated between control points; one mix "
        "up to a layer that is searched and another above",
    )
    control_points: int = Field(default=3, ge=2)
    freeze: list[Freeze] = Field(default=[])
    ranges_for: list[Narrow] = Field(default=[])
    grow: bool = Field(
        default=False, description="begin with one group for the whole model, then refine around the best"
    )
    stack: StackConfig | None = Field(default=None, description="search a stack of layers instead of merging tensors")
    weight: Range | None = None
    density: Range | None = None
    lam: Range | None = Field(default=None, alias="lambda")

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> SpaceConfig:
        for key, (low, high) in self.ranges().items():
            if low > high:
                raise ValueError(f"{key}: [{low}, {high}]: the first number must not exceed the second")
        return self

    @field_validator("methods", "components")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        twice = next((v for v in value if value.count(v) > 1), None)
        if twice:
            raise ValueError(f"{twice!r} is listed twice: name it once")
        return value

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Every range that the file gives, by the parameter's YAML name; `space.py` refuses what is no parameter."""
        named = {"weight": self.weight, "density": self.density, "lambda": self.lam}
        return {**{key: value for key, value in named.items() if value is not None}, **_ranges(self.model_extra or {})}


def _ranges(extra: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    ranges = {}
    for key, value in extra.items():
        value = _as_range(value)
        if not (
            isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
        ):
            # a misspelt key of another kind: space.py names the nearest valid one
            value = (float("nan"), float("nan"))
        ranges[key] = (value[0], value[1])
    return ranges


class SearchConfig(Strict):
    """What is run, in what order, and how long. Further keys are the strategies' own, see `mergesearch strategies`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    strategy: Annotated[list[str], ONE_OR_MORE] = Field(
        default=[AUTO], min_length=1, description="one or a list, each starting from what the earlier ones found"
    )
    trials: int = Field(default=40, ge=0, description="how many candidates, those of the baselines not counted")
    hours: float | None = Field(default=None, gt=0, description="of work, over all starts and workers")
    documents: int | None = Field(
        default=None, ge=1, description="document evaluations; a backward pass counts as two more"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of samplers, soups and random masks")

    @classmethod
    def further(cls) -> type[Strict]:
        """The keys that strategies add, as a model of their own."""
        keys: dict[str, Any] = {}
        for strategy in registry.strategies().values():
            keys |= strategy.keys
        return pydantic.create_model("StrategyKeys", __base__=Strict, **keys)

    @field_validator("strategy")
    @classmethod
    def _strategies_are_known(cls, value: list[str]) -> list[str]:
        known = [AUTO, *(name for name, strategy in registry.strategies().items() if strategy.named)]
        for name in value:
            if name not in known:
                close = nearest(name, known)
                hint = f"did you mean {close!r}? " if close else ""
                raise ValueError(f"{name!r} is no strategy: {hint}(known: {', '.join(known)})")
        return value

    @model_validator(mode="after")
    def _strategies_keys_are_valid(self) -> SearchConfig:
        given = self.model_extra
        if given is not None:  # of a model that takes further keys it never is
            valid = self.further().model_validate(given)
            given.clear()
            given.update({name: getattr(valid, name) for name in type(valid).model_fields})
        return self

    @model_validator(mode="after")
    def _what_never_ends_is_last(self) -> SearchConfig:
        known = registry.strategies()
        there = [name for name in self.strategies if known[name].open_ended]
        if len(there) > 1:
            raise ValueError(
                f"strategy {there[0]} goes on until the budget ends, so {there[1]} would never begin: leave one of "
                "them out"
            )
        return self

    @property
    def strategies(self) -> list[str]:
        """The strategies in order, `auto` written out, and with those that join by themselves."""
        known = registry.strategies()
        auto = sorted((place, name) for name, each in known.items() if (place := each.auto) is not None)
        named = [name for given in self.strategy for name in ([n for _, n in auto] if given == AUTO else [given])]
        joined = [name for name, strategy in known.items() if strategy.joins(self)]
        return sorted(dict.fromkeys([*named, *joined]), key=lambda name: known[name].order)

    def key(self, name: str, kind: type[T]) -> T:
        """The value of a key that a strategy adds.

        Raises:
            KeyError: no strategy adds it.
            TypeError: it is of another kind.
        """
        value = (self.model_extra or {})[name]
        if not isinstance(value, kind):
            raise TypeError(f"search.{name} is {type(value).__name__}, not {kind.__name__}")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        mine = handler.resolve_ref_schema(handler(schema))
        keys = handler.resolve_ref_schema(handler(cls.further().__pydantic_core_schema__))
        mine["properties"] = {**mine.get("properties", {}), **keys.get("properties", {})}
        mine["additionalProperties"] = False
        return mine


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


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `key=value` overrides (`search.trials=10`, `tasks.0.limit=50`).

    Paths come out absolute. In the file, `base_model`, `models`, `include_path` and what strategies take as paths are
    relative to the file. Overrides, and `output` and `storage` wherever they stand, are relative to the caller's
    folder.

    Raises:
        UserError: what is wrong with the file or an override, in one sentence.
    """
    data = read_yaml(path)
    keys = [_override(data, override) for override in overrides]
    _make_absolute(data, Path(path), keys)
    return validate(Config, data, str(path))


def _make_absolute(data: dict[str, Any], file: Path, overridden: Sequence[tuple[str, ...]]) -> None:
    """Makes the paths in a configuration's data absolute: those of the file from its folder, those of overrides from
    the caller's.

    Args:
        data: changed in place.
        file: where the data were read.
        overridden: the keys that overrides have set, each taken apart.
    """
    for place, key, location, make in _paths_in(data):
        typed = any(location[: len(keys)] == keys for keys in overridden)
        where = f"--set {'.'.join(location)}" if typed else f"{file}: {'.'.join(location)}"
        place[key] = make(place[key], Path.cwd() if typed else file.parent, where)
    if isinstance(storage := data.get("storage"), str):
        data["storage"] = _absolute_storage(storage)


def _paths_in(data: dict[str, Any]) -> Iterator[tuple[Any, Any, tuple[str, ...], Callable[[str, Path, str], str]]]:
    """Where paths stand in a configuration's data: what holds one, its key there, the whole key taken apart, and what
    makes it absolute. What is no text is left to the validation."""
    if isinstance(data.get("base_model"), str):
        yield data, "base_model", ("base_model",), absolute_reference
    models = data.get("models")
    for name, reference in models.items() if isinstance(models, dict) else ():
        if isinstance(reference, str):
            yield models, name, ("models", str(name)), absolute_reference
    search = [key for strategy in registry.strategies().values() for key in strategy.paths]
    holders = [(data, ("include_path",)), *((data.get("search"), ("search", key)) for key in search)]
    for holder, location in holders:
        paths = holder.get(location[-1]) if isinstance(holder, dict) else None
        if isinstance(paths, str):
            yield holder, location[-1], location, absolute_path
        for position, path in enumerate(paths if isinstance(paths, list) else ()):
            if isinstance(path, str):
                yield paths, position, (*location, str(position)), absolute_path


def _absolute_storage(url: str) -> str:
    """The URL of a SQLite file with its path from the caller's folder made absolute; any other URL as it is."""
    scheme, separator, path = url.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite" or not path or path.startswith((":memory:", "file:")):
        return url
    return f"{scheme}:///{absolute(path, Path.cwd())}"


def _override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets what an override says, and returns the key that it sets, taken apart."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write it as key=value, for example --set search.trials=10")
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        place = _step(place, part, key)
    if isinstance(place, list):
        place[_position(place, last, key)] = parse_yaml(text, f"--set {key}")
    elif isinstance(place, dict):
        place[last] = parse_yaml(text, f"--set {key}")
    else:
        raise UserError(f"--set {key}: {'.'.join(parents)} holds {place!r}, which has no keys")
    return (*parents, last)


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise UserError(f"--set {key}: there is nothing below {place!r}")


def _position(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"--set {key}: {part!r} is no position in a list of {len(place)}: count from 0")
    return int(part)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


__all__ = [
    "Config",
    "Freeze",
    "GuardConfig",
    "Narrow",
    "ObjectiveConfig",
    "RacingConfig",
    "SearchConfig",
    "Selector",
    "SpaceConfig",
    "StackConfig",
    "TaskConfig",
    "read",
]
