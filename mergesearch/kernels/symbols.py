"""A method run once on symbols: which elementwise operations and which statistics it is made of.

`record` calls a method's plain function with symbols in the place of its tensors. Elementwise operations on them are
written down, not done; statistics are asked for through a callback; scalars, which are real 0-d tensors, are computed
on the spot. What a method does besides (a branch on a tensor's values, an operation in place) raises `Unsupported`:
then the plain definition is used, so no method has to know of any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from mergesearch.errors import UserError
from mergesearch.methods import Method
from mergesearch.methods.statistics import Statistic, listening

_BINARY = ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
# more steps than this make a kernel that takes minutes to compile
_MOST_STEPS = 1500


class Unsupported(Exception):
    """This method, with these parameters, cannot be split into statistics and elementwise operations."""


class Slot:
    """Stands for the mask key of one model."""

    def __init__(self, model: int):
        self.model = model


class Symbol:
    """A tensor of which only the origin is known. `kind`: "base", "model", "statistic" or "step".

    `big`: it has the merged tensor's shape. A small one (a threshold, a cosine) carries `value`, what it is for the
    first tensor of the group: the same for the others in shape and dtype, not in value.
    """

    def __init__(self, tape: Tape, kind: str, what: Any, args: tuple[Any, ...], kwargs: dict[str, Any], big: bool):
        self.tape, self.kind, self.what, self.args, self.kwargs, self.big = tape, kind, what, args, kwargs, big
        self.value: Any = None
        self._meta: Tensor | None = None
        self.number = tape.count()

    @property
    def meta(self) -> Tensor:
        """A tensor without data, of this one's shape and dtype."""
        if not self.big:
            return self.value
        if self._meta is None:
            self._meta = self.tape.blank(self)
        return self._meta

    shape = property(lambda self: self.tape.shape if self.big else self.value.shape)
    ndim = property(lambda self: len(self.shape))
    dtype = property(lambda self: self.meta.dtype)
    device = property(lambda self: self.tape.device if self.big else self.value.device)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(len(self))])

    def __getitem__(self, index: Any) -> Any:
        return self.tape.step(torch.Tensor.__getitem__, (self, index), {})

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch.Tensor, name, None)
        if name.startswith("__") or not callable(function):
            raise Unsupported(name)
        return lambda *args, **kwargs: self.tape.step(function, (self, *args), kwargs)

    def _refuse(self, *_: Any) -> Any:
        raise Unsupported("a value that differs from tensor to tensor decides what is done")

    __bool__ = __float__ = __int__ = __index__ = __array__ = _refuse
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape = next(found.tape for found in symbols_in((args, kwargs or {})))
        return tape.step(func, tuple(args), kwargs or {})


def _operator(name: str) -> Any:
    function = getattr(torch.Tensor, name)
    return lambda self, *others: self.tape.step(function, (self, *others), {})


for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), *_COMPARISONS, "neg", "invert", "abs", "matmul", "rmatmul"):
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))


class Tape:
    """One recording: the shape of the tensors, and what answers a statistic for the first of them."""

    def __init__(self, shape: torch.Size, device: torch.device, answer: Callable[[Symbol], Tensor]):
        self.shape, self.device, self.answer = shape, device, answer
        self.statistics: list[Symbol] = []
        self._count = 0

    def count(self) -> int:
        self._count += 1
        if self._count > _MOST_STEPS:
            raise Unsupported(f"more than {_MOST_STEPS} steps")
        return self._count

    def leaf(self, kind: str, index: int = 0) -> Symbol:
        return Symbol(self, kind, index, (), {}, True)

    def step(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = symbols_in((args, kwargs))
        if any(symbol.big for symbol in found):
            if _in_place(str(resolve_name(function)).rpartition(".")[2]):
                raise Unsupported(f"{function} in place")
            return Symbol(self, "step", function, args, kwargs, True)
        value = function(*replace(args, lambda s: s.value), **replace(kwargs, lambda s: s.value))
        return self._small(function, args, kwargs, value)

    def _small(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [self._small(_item, (function, args, kwargs, i), {}, part) for i, part in enumerate(value)]
        if not isinstance(value, Tensor):
            raise Unsupported(f"{function} gives no tensor")
        made = Symbol(self, "step", function, args, kwargs, False)
        made.value = value
        return made

    def listen(self, statistic: Statistic, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a statistic gives while a method is recorded."""
        if not symbols_in((args, kwargs)) and statistic.how != "uniform":
            with listening(None):
                return statistic.function(*args, **kwargs)
        made = Symbol(self, "statistic", statistic, args, kwargs, statistic.per_element)
        if not statistic.per_element:
            self.statistics.append(made)
            made.value = self.answer(made)
        return made

    def blank(self, symbol: Symbol) -> Tensor:
        if symbol.kind in ("base", "model"):
            return torch.empty(self.shape, dtype=torch.float32, device="meta")
        args, kwargs = replace((symbol.args, symbol.kwargs), lambda s: s.meta)
        if symbol.kind == "statistic" and symbol.what.how == "uniform":
            return torch.empty(self.shape, dtype=torch.float32, device="meta")
        function = symbol.what.function if symbol.kind == "statistic" else symbol.what
        with listening(None):
            return function(*args, **kwargs)


def _in_place(name: str) -> bool:
    return name.startswith("__i") and name != "__invert__" if name.startswith("__") else name.endswith("_")


def _item(function: Any, args: Any, kwargs: Any, index: int) -> Tensor:
    return function(*args, **kwargs)[index]


def symbols_in(tree: Any) -> list[Symbol]:
    """Every symbol in nested tuples, lists and dictionaries."""
    if isinstance(tree, Symbol):
        return [tree]
    if isinstance(tree, Mapping):
        return [found for part in tree.values() for found in symbols_in(part)]
    if isinstance(tree, (tuple, list)):
        return [found for part in tree for found in symbols_in(part)]
    return []


def replace(tree: Any, change: Callable[[Symbol], Any]) -> Any:
    """The same nest with every symbol changed."""
    if isinstance(tree, Symbol):
        return change(tree)
    if isinstance(tree, dict):
        return {key: replace(part, change) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([replace(part, change) for part in tree])
    return tree


def wrap(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Complete parameters by their names in Python, numbers as 0-d float64 tensors: no value is built into a kernel."""
    return {
        method.parameters[key].name: _scalar(value) if method.parameters[key].kind == "float" else value
        for key, value in parameters.items()
    }


def _scalar(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_scalar(v) for v in value]
    return torch.tensor(value, dtype=torch.float64)


def record(
    method: Method,
    parameters: Mapping[str, Any],
    models: int,
    has_base: bool,
    shape: torch.Size,
    device: torch.device,
    answer: Callable[[Symbol], Tensor],
) -> tuple[Symbol, Sequence[Symbol]]:
    """What a method does to tensors of one shape: the result's symbol, and the small statistics in order.

    Args:
        answer: gives a statistic's value for the first tensor.

    Raises:
        Unsupported: the method cannot be split up.
    """
    tape = Tape(shape, device, answer)
    base = tape.leaf("base") if has_base else None
    given = wrap(method, parameters)
    if method.random:
        given["keys"] = [Slot(i) for i in range(models)]
    try:
        with listening(tape.listen):
            result = method.function(base, [tape.leaf("model", i) for i in range(models)], **given)
    except (Unsupported, UserError):
        raise
    except Exception as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    if not isinstance(result, Symbol) or not result.big:
        raise Unsupported("the result is no tensor of the inputs' shape")
    return result, tape.statistics
