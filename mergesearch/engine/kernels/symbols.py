"""A method run once on symbols: which elementwise operations and which statistics it is made of.

`record` calls a method's plain function with symbols in the place of its tensors. Elementwise operations on them are
written down, not done; statistics are asked for through a callback; scalars are computed on the spot and written down
too, so that one recording serves other numbers. What a method does besides (a branch on a tensor's values, an operation
in place) raises `Unsupported`: then the plain definition is used, so no method has to know of any of this.

Why the recording is the method. A method is a pure function of its tensors and parameters. With symbols in their place
Python runs the very same lines, and each operation ends in `Tape.step`: the list of steps is what torch would have been
asked to do, in that order, with the same arguments. Three things could make the list hold for these inputs alone, and
each is caught: a branch on a tensor's value (`Symbol.__bool__` and the like raise), an operation in place (raises), and
a branch on a parameter's value, which is noted in `Tape.reads`: the recording then serves that value only. Shapes
decide as they always do; a recording serves one shape. A step is computed by the function that was recorded, never by
another that should do the same, so a small value (a threshold, a cosine) has the bits that the method itself would have
got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import resolve_name

from mergesearch.errors import UserError
from mergesearch.methods import Method
from mergesearch.methods.listening import Statistic, listening

_BINARY = ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
# more steps than this make a kernel that takes minutes to compile
_MOST_STEPS = 1500


class Unsupported(Exception):
    """This method, with these parameters, cannot be split into statistics and elementwise operations."""


class MaskSlot:
    """Stands for the mask key of one model."""

    def __init__(self, model: int):
        self.model = model


class Symbol:
    """A tensor of which only the origin is known. `kind`: "base", "model", "parameter", "statistic" or "step".

    `big`: it has the merged tensor's shape. A small one (a threshold, a cosine) carries `value`, what it is for the
    first tensor of the group: the same for the others in shape and dtype, not in value. `alike`: it is made of
    parameters alone, so that it has one value for all tensors; `differing`: those of its `inputs` that are not.
    """

    def __init__(self, tape: Tape, kind: str, what: Any, args: tuple[Any, ...], kwargs: dict[str, Any], big: bool):
        # a number's symbol stands for it, so that what is kept holds no numbers
        args, kwargs = replace((args, kwargs), lambda s: s)
        self.tape = tape
        self.kind = kind
        self.what = what
        self.args: tuple[Any, ...] = args
        self.kwargs: dict[str, Any] = kwargs
        self.big = big
        self.value: Any = None
        self.simple: bool = not kwargs and not any(isinstance(a, (list, tuple, dict)) for a in args)
        self.inputs: list[Symbol] = symbols_in((args, kwargs))
        self.differing: list[Symbol] = [s for s in self.inputs if not s.alike]
        self.alike: bool = kind == "parameter" or (kind == "step" and not big and not self.differing)
        self._dtype: torch.dtype | None = None
        self.specimens: dict[bool, Tensor] = {}
        self.number: int = tape.count()

    @property
    def dtype(self) -> torch.dtype:
        if not self.big:
            return self.value.dtype
        if self._dtype is None:
            self._dtype = self.tape.dtype_of(self)
        return self._dtype

    @property
    def shape(self) -> torch.Size:
        return self.tape.shape if self.big else self.value.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.tape.device if self.big else self.value.device

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

    __bool__: ClassVar[Callable[..., Any]] = _refuse
    __float__: ClassVar[Callable[..., Any]] = _refuse
    __int__: ClassVar[Callable[..., Any]] = _refuse
    __index__: ClassVar[Callable[..., Any]] = _refuse
    __array__: ClassVar[Callable[..., Any]] = _refuse
    __hash__: ClassVar[Callable[[Any], int]] = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tape = next(symbol.tape for symbol in symbols_in((args, kwargs or {})))
        return tape.step(func, tuple(args), kwargs or {})


def _operator(name: str) -> Any:
    function = getattr(torch.Tensor, name)
    return lambda self, *others: self.tape.step(function, (self, *others), {})


for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), *_COMPARISONS, "neg", "invert", "abs", "matmul", "rmatmul"):
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))


class Number(Tensor):
    """A 0-d tensor that a parameter is, or that is made of parameters alone: it has a value, and `symbol` its origin.

    Whoever reads the value to decide something by it may; that the decision hangs on it is written down.
    """

    symbol: Symbol

    @classmethod
    def of(cls, symbol: Symbol) -> Number:
        number = torch.Tensor._make_subclass(cls, symbol.value)
        number.symbol = symbol
        return number

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        symbols = symbols_in((args, kwargs))
        name = str(resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if name in ("__get__", "__len__", "dim", "size", "numel", "is_floating_point", "__hash__"):
            return func(*replace(args, lambda s: s.value), **replace(kwargs, lambda s: s.value))
        if name in _READING:
            for symbol in symbols:
                symbol.tape.read(symbol)
            return func(*replace(args, lambda s: s.value), **replace(kwargs, lambda s: s.value))
        return symbols[0].tape.step(func, tuple(args), kwargs)


_READING = ("__bool__", "__float__", "__int__", "__index__", "__array__", "item", "tolist", "numpy", "__format__",
            "__repr__", "__contains__", "is_nonzero", "equal", "allclose")  # fmt: skip


class Tape:
    """One recording: the shape of the tensors, and what answers a statistic for the first of them."""

    def __init__(self, shape: torch.Size, device: torch.device, answer: Callable[[Symbol], Tensor]):
        self.shape = shape
        self.device = device
        self.answer: Callable[[Symbol], Tensor] | None = answer
        self.reads: set[Any] = set()
        self._count = 0

    def parameter(self, place: Any, value: float) -> Number:
        """A parameter's number; `place` says which it is."""
        symbol = Symbol(self, "parameter", place, (), {}, False)
        symbol.value = torch.tensor(value, dtype=torch.float64)
        return Number.of(symbol)

    def read(self, symbol: Symbol) -> None:
        """Something was decided by the value of a symbol that is made of parameters."""
        if symbol.kind == "parameter":
            self.reads.add(symbol.what)
        for other in symbols_in((symbol.args, symbol.kwargs)):
            self.read(other)

    def count(self) -> int:
        self._count += 1
        if self._count > _MOST_STEPS:
            raise Unsupported(f"more than {_MOST_STEPS} steps")
        return self._count

    def leaf(self, kind: str, index: int = 0) -> Symbol:
        return Symbol(self, kind, index, (), {}, True)

    def step(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        symbols = symbols_in((args, kwargs))
        if any(symbol.big for symbol in symbols):
            if _in_place(str(resolve_name(function)).rpartition(".")[2]):
                raise Unsupported(f"{function} in place")
            return Symbol(self, "step", function, args, kwargs, True)
        value = function(*replace(args, lambda s: s.value), **replace(kwargs, lambda s: s.value))
        return self._small(function, args, kwargs, value)

    def _small(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [self._small(part_of, (function, args, kwargs, i), {}, part) for i, part in enumerate(value)]
        if not isinstance(value, Tensor):
            raise Unsupported(f"{function} gives no tensor")
        symbol = Symbol(self, "step", function, args, kwargs, False)
        symbol.value = value
        return Number.of(symbol) if symbol.alike and value.ndim == 0 else symbol

    def listen(self, statistic: Statistic, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a statistic gives while a method is recorded."""
        if statistic.how == "matrix":
            raise Unsupported("a decomposition of whole matrices")
        if statistic.how == "part":
            return statistic.function(*args, **kwargs)
        if not symbols_in((args, kwargs)) and statistic.how != "uniform":
            with listening(None):
                return statistic.function(*args, **kwargs)
        symbol = Symbol(self, "statistic", statistic, args, kwargs, statistic.per_element)
        if not statistic.per_element:
            assert self.answer is not None  # the recording is not over
            symbol.value = self.answer(symbol)
        return symbol

    def dtype_of(self, symbol: Symbol) -> torch.dtype:
        """The dtype of a big symbol: what comes out for a few elements, or, where small values have dimensions that do
        not fit those, for tensors without data. (These load parts of torch that take seconds to load.)"""
        try:
            return self._specimen(symbol, True).dtype
        except (RuntimeError, IndexError, ValueError):
            return self._specimen(symbol, False).dtype

    def _specimen(self, symbol: Symbol, few: bool) -> Tensor:
        if not symbol.big:
            return symbol.value
        if few not in symbol.specimens:
            symbol.specimens[few] = self._make(symbol, few)
        return symbol.specimens[few]

    def _make(self, symbol: Symbol, few: bool) -> Tensor:
        drawn = symbol.kind == "statistic" and symbol.what.how == "uniform"
        if symbol.kind in ("base", "model") or drawn:
            shape = [min(n, 2) for n in self.shape] if few else self.shape
            return torch.ones(shape, dtype=torch.float32, device="cpu" if few else "meta")
        args, kwargs = replace((symbol.args, symbol.kwargs), lambda s: self._specimen(s, few))
        function = symbol.what.function if symbol.kind == "statistic" else symbol.what
        with listening(None):
            return function(*args, **kwargs)


def _in_place(name: str) -> bool:
    return name.startswith("__i") and name != "__invert__" if name.startswith("__") else name.endswith("_")


def part_of(function: Any, args: Any, kwargs: Any, index: int) -> Tensor:
    """One of the tensors that a function gives; a function of its own, so that each can be a step."""
    return function(*args, **kwargs)[index]


def symbols_in(tree: Any) -> list[Symbol]:
    """Every symbol in nested tuples, lists and dictionaries."""
    if isinstance(tree, (Symbol, Number)):
        return [tree if isinstance(tree, Symbol) else tree.symbol]
    if isinstance(tree, Mapping):
        return [symbol for part in tree.values() for symbol in symbols_in(part)]
    if isinstance(tree, (tuple, list)):
        return [symbol for part in tree for symbol in symbols_in(part)]
    return []


def replace(tree: Any, change: Callable[[Symbol], Any]) -> Any:
    """The same nest with every symbol changed."""
    if isinstance(tree, (Symbol, Number)):
        return change(tree if isinstance(tree, Symbol) else tree.symbol)
    if isinstance(tree, dict):
        return {key: replace(part, change) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([replace(part, change) for part in tree])
    return tree


def _parameters(tape: Tape, method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Complete parameters by their names in Python, numbers as `Number`: no value is built into a kernel."""
    given = dict(parameters)
    for place, value in numbers(method, parameters).items():
        number, (key, index) = tape.parameter(place, value), place
        if index is None:
            given[key] = number
        else:
            given[key] = [*given[key][:index], number, *given[key][index + 1 :]]
    return {method.parameters[key].name: value for key, value in given.items()}


def numbers(method: Method, parameters: Mapping[str, Any]) -> dict[tuple[str, int | None], float]:
    """The values of the parameters that are numbers, by key and position in a list."""
    values: dict[tuple[str, int | None], float] = {}
    for key, value in parameters.items():
        if method.parameters[key].kind == "float":
            if isinstance(value, (list, tuple)):
                values.update({(key, i): v for i, v in enumerate(value)})
            else:
                values[key, None] = value
    return values


def record(
    method: Method,
    parameters: Mapping[str, Any],
    models: int,
    has_base: bool,
    shape: torch.Size,
    device: torch.device,
    answer: Callable[[Symbol], Tensor],
) -> tuple[Symbol, frozenset[Any]]:
    """What a method does to tensors of one shape: the result's symbol, and which parameters' values it hangs on.

    Args:
        answer: gives a statistic's value for the first tensor.

    Raises:
        Unsupported: the method cannot be split up.
    """
    tape = Tape(shape, device, answer)
    base = tape.leaf("base") if has_base else None
    given = _parameters(tape, method, parameters)
    if method.random:
        given["keys"] = [MaskSlot(i) for i in range(models)]
    try:
        with listening(tape.listen):
            result = method.function(base, [tape.leaf("model", i) for i in range(models)], **given)
    except (Unsupported, UserError):
        raise
    except Exception as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    if not isinstance(result, Symbol) or not result.big:
        raise Unsupported("the result is no tensor of the inputs' shape")
    return result, frozenset(tape.reads)
