"""What a merge method is: a function whose signature is its schema, its search space and its documentation."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import numbers
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from mergesearch.methods.masks import MaskKey

Base = Literal["required", "optional", "unused"]
Family = Literal["interpolation", "task_vector", "structure"]
# what of the documents a method goes by: Gram matrices of layers' inputs, or squared gradients
Data = Literal["inputs", "squares"]

# between a method and what is done to its result: `ties+svc`
_WRAPPED = "+"

_registered: dict[str, Method] = {}
_wrappers: dict[str, Wrapper] = {}
_composed: dict[str, tuple[Method, Method]] = {}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a method. A method's file writes it as `Annotated[float, Parameter(...)]` in the signature;
    `name`, `key` and `default` are then taken from there.

    `low` and `high` bound what is allowed (None: unbounded; `low_open`: `low` itself is not allowed), `search` is the
    range that a search proposes by default (None: not searched; for "choice" and "bool" any value but None means that
    every choice is proposed).
    """

    name: str = ""
    key: str = ""
    default: Any = None
    per_model: bool = False
    kind: Literal["float", "int", "bool", "choice"] = "float"
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()
    search: tuple[float, float] | None = None
    meaning: str = ""

    @property
    def allowed(self) -> str:
        """The values allowed, in words: `in (0, 1]`, `true or false`, `one of inverse, l1`."""
        if self.kind == "bool":
            return "true or false"
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        noun = "a whole number" if self.kind == "int" else "a number"
        if self.low is None and self.high is None:
            return noun
        left = "(-inf" if self.low is None else f"{'(' if self.low_open else '['}{self.low:g}"
        right = "inf)" if self.high is None else f"{self.high:g}{')' if self.high_open else ']'}"
        return f"{noun} in {left}, {right}"

    def check(self, value: Any, where: str) -> Any:
        """`value` as a Python float, int, bool or str; `UserError` with the value and what is allowed otherwise.

        Exponents written as YAML 1.1 reads them, `1e-5`, arrive as text and are taken as the number they are.
        """
        plain = self._plain(value)
        if plain is None or not self._inside(plain):
            raise UserError(f"{self.key} {value!r} in {where} is not allowed: it must be {self.allowed}")
        return plain

    def _plain(self, value: Any) -> Any:
        if self.kind == "bool":
            return value if isinstance(value, bool) else None
        if self.kind == "choice":
            return value if isinstance(value, str) else None
        number = _number(value)
        if number is None or self.kind == "float":
            return number
        return int(number) if number.is_integer() else None

    def _inside(self, value: Any) -> bool:
        if self.kind == "bool":
            return True
        if self.kind == "choice":
            return value in self.choices
        above = self.low is None or value > self.low or (value == self.low and not self.low_open)
        below = self.high is None or value < self.high or (value == self.high and not self.high_open)
        return above and below


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A registered wrapper: what is done to the result of any method, as `f(base, models, merged, *, ...)`.

    A recipe names it after the method: `ties+svc`. What is wrapped has the parameters of both, and needs a base.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter]
    paper: str
    summary: str
    matrices: bool = False

    def around(self, inner: Method) -> Method:
        """The method of that name. Raises `ValueError` where both have a parameter of one name that differs."""
        for key in self.parameters.keys() & inner.parameters.keys():
            if self.parameters[key] != inner.parameters[key]:
                raise ValueError(f"{inner.name} and {self.name} mean different things by {key!r}")
        mine = [p.name for p in self.parameters.values()]
        theirs = {p.name for p in inner.parameters.values()} | {"keys", "statistics"}

        def wrapped(base: Tensor, models: Sequence[Tensor], **given: Any) -> Tensor:
            merged = inner.function(base, models, **{k: v for k, v in given.items() if k in theirs})
            return self.function(base, models, merged, **{name: given[name] for name in mine})

        wrapped.__doc__ = "\n\n".join(inspect.getdoc(f) or "" for f in (inner.function, self.function))
        return dataclasses.replace(
            inner,
            name=f"{inner.name}{_WRAPPED}{self.name}",
            function=wrapped,
            parameters={**inner.parameters, **self.parameters},
            base="required",
            family="task_vector",
            paper=f"{inner.paper}; {self.paper}",
            summary=f"{inner.summary} Then: {self.summary}",
            matrices=inner.matrices or self.matrices,
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered merge method. `parameters` is keyed by the name used in YAML; `max_models` None means any number.

    `base`: "required", "optional" (task vectors where there is one) or "unused" (the models alone).
    `random`: it draws masks and takes `keys`, one for each model. `matrices`: it decomposes matrices, and what merges
    embeddings, heads and routers in its place is `aside`, unless its parameter `embeddings` is true. `data`: it takes
    `statistics`, one tensor or None for each model, of the kind named, which a recipe names by their hash.
    """

    name: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, Parameter]
    base: Base
    min_models: int
    max_models: int | None
    random: bool
    family: Family
    paper: str
    summary: str
    matrices: bool = False
    data: Data | None = None

    @property
    def aside(self) -> str:
        """What merges the tensors that a method of matrices leaves out: the average of task vectors; for a wrapped
        method the same without the wrappers that are such methods."""
        inner, *around = self.name.split(_WRAPPED)
        inner = "task_arithmetic" if get(inner).matrices else inner
        return _WRAPPED.join([inner, *(name for name in around if not _wrappers[name].matrices)])

    def complete_aside(self, complete: Mapping[str, Any]) -> dict[str, Any]:
        """The complete parameters of `aside`, from this method's: those that both have, and a mean where it averages
        in the place of a method of matrices."""
        other = get(self.aside)
        known = {key: p.default for key, p in other.parameters.items() if not p.per_model}
        known |= {key: complete[key] for key in other.parameters if key in complete}
        if get(self.name.split(_WRAPPED)[0]).matrices:
            known["normalize"] = True
        return known

    def complete(
        self, parameters: Mapping[str, Any], models: Sequence[str], where: str, *, has_base: bool = True
    ) -> dict[str, Any]:
        """All parameters, checked, defaults filled in; per-model ones as lists aligned with `models`.

        A per-model parameter may be one value for all, a list aligned with `models`, or a mapping from model names
        (those not named get the default). Raises `UserError` for an unknown parameter or model name, a value out of
        range, a list of another length, a wrong number of models, a missing base.
        """
        self.check_models(len(models), where, has_base=has_base)
        for key in parameters:
            if key not in self.parameters:
                raise unknown(f"parameter of {self.name}", key, self.parameters, where)
        return {key: self._complete_one(p, parameters, models, where) for key, p in self.parameters.items()}

    def check_models(self, count: int, where: str, *, has_base: bool = True) -> None:
        """`UserError` where the method cannot merge `count` models with or without a base."""
        if count < self.min_models or (self.max_models is not None and count > self.max_models):
            raise UserError(f"{self.name} in {where} merges {self._count()}, not {count}")
        if self.base == "required" and not has_base:
            raise UserError(f"{self.name} in {where} needs a base model: name one, or use linear, slerp or karcher")

    def _count(self) -> str:
        noun = "model" if self.min_models == 1 and self.max_models in (None, 1) else "models"
        if self.max_models is None:
            return f"{self.min_models} {noun} or more"
        if self.min_models == self.max_models:
            return f"exactly {self.min_models} {noun}"
        return f"{self.min_models} to {self.max_models} {noun}"

    def _complete_one(self, parameter: Parameter, given: Mapping[str, Any], models: Sequence[str], where: str) -> Any:
        value = given.get(parameter.key, parameter.default)
        if not parameter.per_model:
            return parameter.check(value, where)
        spread = _spread(parameter, value, models, where)
        return [parameter.check(v, f"{where} ({model})") for v, model in zip(spread, models, strict=True)]

    def __call__(
        self,
        base: Tensor | None,
        models: Sequence[Tensor],
        parameters: Mapping[str, Any],
        keys: Sequence[MaskKey] | None = None,
        statistics: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The merged tensor, of the inputs' shape and dtype (float32 or float64).

        `parameters` must be complete (`complete`); `keys`, one mask key for each model, is used by random methods only,
        `statistics`, one for each model, by those of data only.
        A tensor of no elements is returned as it is, by every method.
        """
        if base is None and self.base == "required":
            raise UserError(f"{self.name} needs a base model")
        if models[0].numel() == 0:
            return models[0].clone()
        if models[0].ndim == 0:
            # two 0-d tensors promote to the wider dtype where a vector would keep its own
            wide = None if base is None else base.reshape(1)
            given = None if statistics is None else [None if s is None else s.reshape(1) for s in statistics]
            return self(wide, [m.reshape(1) for m in models], parameters, keys, given).reshape(())
        named = {self.parameters[key].name: value for key, value in parameters.items()}
        return self.function(
            base, models, **named, **self._masks(keys, len(models)), **self._data(statistics, len(models))
        )

    def _masks(self, keys: Sequence[MaskKey] | None, count: int) -> dict[str, Any]:
        if not self.random:
            return {}
        if keys is None or len(keys) != count:
            raise ValueError(f"{self.name} draws masks: pass one mask key for each of the {count} models")
        return {"keys": keys}

    def _data(self, statistics: Sequence[Tensor | None] | None, count: int) -> dict[str, Any]:
        if self.data is None:
            return {}
        if statistics is None or len(statistics) != count:
            raise ValueError(f"{self.name} goes by statistics: pass one for each of the {count} models")
        return {"statistics": statistics}


def method(
    *,
    paper: str,
    family: Family,
    base: Base,
    min_models: int = 1,
    max_models: int | None = None,
    name: str | None = None,
    matrices: bool = False,
    data: Data | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `f(base, models, *, ...) -> Tensor` as a merge method, under its own name unless `name` says otherwise.

    The function gets tensors of one shape, dtype and device, of at least one dimension and one element (0-d tensors
    come as vectors of one element). Every keyword parameter is `Annotated[type, Parameter(...)]` with a default; one
    named `keys` makes the method random; one named `statistics` goes with `data`. The function is returned as it is.
    The first line of its docstring becomes the summary.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        new = Method(
            name=name or function.__name__,
            function=function,
            parameters=parameters_of(function),
            base=base,
            min_models=min_models,
            max_models=max_models,
            random=_is_random(function),
            family=family,
            paper=paper,
            summary=_summary(function),
            matrices=matrices,
            data=data,
        )
        _add(new, _registered)
        return function

    return register


def wrapper(*, paper: str, matrices: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `f(base, models, merged, *, ...) -> Tensor` as a wrapper of methods, see `Wrapper` and `method`."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = parameters_of(function)
        _add(Wrapper(function.__name__, function, parameters, paper, _summary(function), matrices), _wrappers)
        return function

    return register


def names() -> list[str]:
    """The names of the methods that need nothing but models, sorted."""
    _discover()
    return sorted(name for name, found in _registered.items() if found.data is None)


def data_names() -> list[str]:
    """The names of the methods that go by statistics of documents, sorted: strategies state them."""
    _discover()
    return sorted(name for name, found in _registered.items() if found.data is not None)


def wrappers() -> list[str]:
    """The names of all wrappers, sorted."""
    _discover()
    return sorted(_wrappers)


def get(name: str, where: str = "the recipe") -> Method:
    """The method called `name`, which may be wrapped: `ties+svc`.

    Raises:
        UserError: there is no such method or wrapper; with the nearest name.
    """
    _discover()
    first, *around = name.split(_WRAPPED)
    if first not in _registered:
        raise unknown("merge method", first, _registered, where)
    if not around:
        return _registered[first]
    for one in around:
        if one not in _wrappers or around.count(one) > 1:
            raise unknown(f"wrapper (once each after {first}{_WRAPPED})", one, _wrappers, where)
    inner = get(name.rpartition(_WRAPPED)[0], where)
    held = _composed.get(name)
    if held is None or held[0] is not inner:
        # one function for each name: what is kept of a method is kept by its function
        held = _composed[name] = (inner, _wrappers[around[-1]].around(inner))
    return held[1]


def get_wrapper(name: str, where: str = "the recipe") -> Wrapper:
    """The wrapper called `name`; `UserError` with the nearest name where there is none."""
    _discover()
    if name not in _wrappers:
        raise unknown("wrapper", name, _wrappers, where)
    return _wrappers[name]


def describe(chosen: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row for each method, or for those chosen: name, family, base, models, summary, paper, parameters (key,
    default, allowed values, default search range, whether one value per model, meaning)."""
    return [_row(get(name)) for name in ([*names(), *data_names()] if chosen is None else chosen)]


def describe_wrappers() -> list[dict[str, Any]]:
    """As `describe`, for each wrapper: name, summary, paper, parameters."""
    return [
        {"name": w.name, "summary": w.summary, "paper": w.paper, "parameters": _columns(w.parameters)}
        for w in map(get_wrapper, wrappers())
    ]


def _row(m: Method) -> dict[str, Any]:
    stated = {c: getattr(m, c) for c in ("name", "family", "base", "random", "matrices", "data", "summary", "paper")}
    return {**stated, "models": m._count(), "parameters": _columns(m.parameters)}


def _columns(parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    columns = ("key", "default", "allowed", "search", "per_model", "meaning")
    return [{c: getattr(p, c) for c in columns} for p in parameters.values()]


def _summary(function: Callable[..., Tensor]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _discover() -> None:
    room = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
        importlib.import_module(module.name)


def _add(new: Any, known: dict[str, Any]) -> None:
    before = known.get(new.name)
    where = (new.function.__module__, new.function.__qualname__)
    if before is not None and (before.function.__module__, before.function.__qualname__) != where:
        raise ValueError(f"merge method {new.name!r} of {where[0]} is already in {before.function.__module__}")
    known[new.name] = new


def unnamed(function: Callable[..., Tensor]) -> Method:
    """What `method` makes of a function that is only a part of a method: nobody finds it by a name."""
    return Method(
        name=function.__name__,
        function=function,
        parameters=parameters_of(function),
        base="unused",
        min_models=1,
        max_models=None,
        random=_is_random(function),
        family="task_vector",
        paper="",
        summary=_summary(function),
    )


def parameters_of(function: Callable[..., Tensor]) -> dict[str, Parameter]:
    """The parameters in a function's signature, by key."""
    hints = typing.get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    found = [_parameter(p, hints.get(p.name)) for p in keywords if p.name not in ("keys", "statistics")]
    return {parameter.key: parameter for parameter in found}


def _is_random(function: Callable[..., Tensor]) -> bool:
    return "keys" in inspect.signature(function).parameters


def _parameter(signature: inspect.Parameter, hint: Any) -> Parameter:
    specs = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Parameter)]
    if not specs or signature.default is signature.empty:
        raise TypeError(f"parameter {signature.name!r} needs a default and an annotation Annotated[type, Parameter()]")
    spec = specs[-1]
    key = spec.key or signature.name
    return dataclasses.replace(spec, name=signature.name, key=key, default=signature.default)


def _spread(parameter: Parameter, value: Any, models: Sequence[str], where: str) -> Sequence[Any]:
    if isinstance(value, Mapping):
        for model in value:
            if model not in models:
                raise unknown(f"model of {parameter.key}", model, models, where)
        return [value.get(m, parameter.default) for m in models]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(models):
            given = f"{len(value)} values {list(value)}"
            raise UserError(f"{parameter.key} in {where} has {given} for {len(models)} models: give one for each")
        return value
    return [value] * len(models)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
