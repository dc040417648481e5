"""Programs as typed operations, and their text in a language that a compiler turns into one pass over memory.

`trace` runs a program once on tiny tensors and writes down what was done, with the dtypes that torch's promotion gives.
`Writer` says how an operation is written: in C++ (native.py) and in Triton (device.py). What is not in the table here
raises `Unsupported`; then the program runs as it stands, block by block.

Why a `Code` gives what the program gives. The tracer sees what torch does at its lowest level, after every
decomposition and promotion: each operation becomes one step on the dtype of torch's own result, with a cast for every
operand of another dtype, as torch casts it. Steps are rounded one by one: no contraction to fused multiply-adds,
divisions and roots to the nearest. Where a step is not written as torch does it, the two are equal on every input:

- `pow(x, 2)` is x * x, which is how torch computes it;
- x * 1 and x / 1 are x, where the dtype stays;
- a truth value as a number, times w (`_counted`): true gives 1 * w = w, false 0 * w, so it is a choice of w and 0 * w,
  which keeps the sign of 0 and the NaN of an infinite w;
- n * p < t with n a whole number and p a power of two (`_compared`): n as a float32 times p has n's significand, so the
  product is exact, and t / p is exact too unless it overflows to an infinity, which lies on the same side of every n:
  comparing n with t / p is the same comparison. So a mask's bits are compared with a density without the product that
  brings them into the unit interval;
- clamp is a maximum and a minimum, in torch's order, with torch's NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mergesearch.engine.kernels.program import Program
from mergesearch.engine.kernels.symbols import Unsupported

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int16, torch.int32, torch.int64)
_KNOWN = (*FLOATS, *INTEGERS, torch.bool)
_SAME = (
    "view", "_unsafe_view", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "expand", "reshape", "squeeze",
    "unsqueeze",
)  # fmt: skip
_CONSTANT = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "zeros": 0, "ones": 1}
_ARITHMETIC = {
    "add": "+", "sub": "-", "mul": "*", "bitwise_xor": "^", "bitwise_or": "|", "bitwise_and": "&",
    "__rshift__": ">>", "__lshift__": "<<", "logical_and": "&", "logical_or": "|",
}  # fmt: skip
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


@dataclass(frozen=True)
class Value:
    """What a variable of the text holds: a number for each element, or one for all (`uniform`)."""

    name: str
    dtype: torch.dtype
    uniform: bool


@dataclass(frozen=True)
class Code:
    """A program's operations.

    Attributes:
        arguments: the dtypes that the tensors x0, ..., e0, ... have in memory.
        scalars: how many numbers s has.
        keys: how many k has.
        steps: (variable, what is done, its inputs), inputs before what uses them. "load", "scalar", "key" and "index"
            bring in numbers.
        result: the variable that holds the result.
    """

    arguments: tuple[torch.dtype, ...]
    scalars: int
    keys: int
    steps: tuple[tuple[Value, str, tuple[Any, ...]], ...]
    result: Value


def trace(program: Program, dtypes: Sequence[torch.dtype]) -> Code:
    """The operations of a program whose tensors are held in `dtypes`.

    Raises:
        Unsupported: an operation that is not in the table, or values for each row.
    """
    if program.rows:
        raise Unsupported("values for each row")
    return _trace(program.source, len(program.parents), tuple(dtypes), len(program.scalars), len(program.words))


@functools.lru_cache(maxsize=512)
def _trace(source: str, parents: int, dtypes: tuple[torch.dtype, ...], scalars: int, words: int) -> Code:
    run = Program(source=source).run
    recorder = _OperationTracer(parents, dtypes, scalars, 1 + 2 * words)
    with recorder:
        (result,) = run(recorder.s, recorder.k, *recorder.arguments)
    return Code(dtypes, scalars, 1 + 2 * words, tuple(recorder.steps), recorder.value(result))


class _OperationTracer(TorchDispatchMode):
    """Writes down operations on tensors of three elements."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load torch._dynamo for it, which takes seconds
        return False

    def __init__(self, parents: int, dtypes: Sequence[torch.dtype], scalars: int, keys: int):
        super().__init__()
        self.steps: list[tuple[Value, str, tuple[Any, ...]]] = []
        self._values: dict[int, tuple[Tensor, Value]] = {}
        self._made: dict[str, tuple[str, tuple[Any, ...]]] = {}
        self._inside: dict[tuple[str, int], Value] = {}
        self.s = torch.ones(max(1, scalars), dtype=torch.float64)
        self.k = torch.zeros(keys, dtype=torch.int32)
        # parents are widened as they are loaded; statistics keep their dtype
        self.arguments = [
            torch.ones(3, dtype=torch.float32 if i < parents else dtype) for i, dtype in enumerate(dtypes)
        ]
        for number, argument in enumerate(self.arguments):
            self._values[id(argument)] = (argument, self._step(argument.dtype, "load", number))

    def value(self, tensor: Tensor) -> Value:
        """The variable of a tensor; one that nothing was seen to make is a constant."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        if tensor.numel() != 1:
            raise Unsupported("a tensor of unknown origin")
        return self._keep(tensor, self._step(tensor.dtype, "constant", tensor.item()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype not in _KNOWN:
            raise Unsupported(f"{func}")
        self._keep(result, self._written(func.overloadpacket.__name__, result, args, kwargs or {}))
        return result

    def _keep(self, tensor: Tensor, value: Value) -> Value:
        self._values[id(tensor)] = (tensor, value)
        return value

    def _step(self, dtype: torch.dtype, what: str, *inputs: Any) -> Value:
        if dtype not in _KNOWN:
            raise Unsupported(f"{dtype}")
        variable = Value(f"v{len(self.steps)}", dtype, _is_uniform(what, inputs))
        self.steps.append((variable, what, inputs))
        self._made[variable.name] = (what, inputs)
        return variable

    def _cast(self, value: Any, dtype: torch.dtype) -> Value:
        if isinstance(value, Tensor):
            value = self.value(value)
        if not isinstance(value, Value):
            return self._step(dtype, "constant", value)
        return value if value.dtype == dtype else self._step(dtype, "cast", value)

    def _written(self, name: str, result: Tensor, args: Any, kwargs: Any) -> Value:
        if (name == "select" and args[0] is self.s) or (name == "select" and args[0] is self.k):
            return self._given("scalar" if args[0] is self.s else "key", args[2], result.dtype)
        if name in _SAME:
            return self.value(args[0])
        if name == "_to_copy":
            return self._cast(args[0], result.dtype)
        if name in _CONSTANT:
            return self._step(result.dtype, "constant", _CONSTANT[name])
        if name in ("full", "full_like", "new_full", "scalar_tensor"):
            return self._step(result.dtype, "constant", args[0 if name == "scalar_tensor" else -1])
        if name == "arange" and len(args) == 1:
            return self._step(result.dtype, "index")
        return self._arithmetic(name, result, args, kwargs)

    def _given(self, kind: str, number: int, dtype: torch.dtype) -> Value:
        if (kind, number) not in self._inside:
            self._inside[kind, number] = self._step(dtype, kind, number)
        return self._inside[kind, number]

    def _arithmetic(self, name: str, result: Tensor, args: Any, kwargs: Any) -> Value:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or set(kwargs) - {"alpha"}:
            raise Unsupported(f"{name} with {kwargs}")
        if name == "where":
            return self._step(
                result.dtype, "where", self.value(args[0]), *(self._cast(a, result.dtype) for a in args[1:])
            )
        if name in ("abs", "neg", "sqrt", "bitwise_not", "logical_not"):
            what = "not" if result.dtype == torch.bool else name
            return self._step(result.dtype, what, self._cast(args[0], result.dtype))
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self._clamp(name, result.dtype, *args)
        if name in ("minimum", "maximum"):
            return self._step(result.dtype, name, *(self._cast(a, result.dtype) for a in args))
        if name == "pow" and args[1] == 2:
            value = self._cast(args[0], result.dtype)
            return self._step(result.dtype, "*", value, value)
        return self._binary(name, result, args)

    def _binary(self, name: str, result: Tensor, args: Any) -> Value:
        if name == "rsub":
            name, args = "sub", (args[1], args[0])
        if len(args) != 2 or name not in (*_ARITHMETIC, *_COMPARISONS, "div"):
            raise Unsupported(name)
        if name in _COMPARISONS:
            common = torch.result_type(*args)
            return self._compared(_COMPARISONS[name], *(self._cast(a, common) for a in args))
        if name == "div" and result.dtype not in FLOATS:
            raise Unsupported("division of integers")
        what = "/" if name == "div" else _ARITHMETIC[name]
        if what in ("*", "/") and _is_one(args[1]) and isinstance(args[0], Tensor) and args[0].dtype == result.dtype:
            return self.value(args[0])
        inputs = [self._cast(a, result.dtype) for a in args]
        return self._counted(*inputs) if what == "*" else self._step(result.dtype, what, *inputs)

    def _compared(self, what: str, left: Value, right: Value) -> Value:
        """A comparison; a whole number times a power of two is compared without the product, which is exact."""
        factor = self._power(left) if right.uniform and left.dtype == right.dtype == torch.float32 else None
        if factor is not None:
            left = self._made[left.name][1][0]
            right = self._step(torch.float32, "*", right, self._step(torch.float32, "constant", 1 / factor))
        return self._step(torch.bool, what, left, right)

    def _power(self, value: Value) -> float | None:
        what, inputs = self._made[value.name]
        if what != "*":
            return None
        (cast, before), (constant, number) = (self._made[i.name] for i in inputs)
        whole = cast == "cast" and before[0].dtype in INTEGERS and constant == "constant"
        return number[0] if whole and 2.0**-30 <= number[0] < 1 and math.frexp(number[0])[0] == 0.5 else None

    def _counted(self, left: Value, right: Value) -> Value:
        """A product; of a truth value as a number with a number for all elements it is a choice of two."""
        what, inputs = self._made[left.name]
        if what == "cast" and inputs[0].dtype == torch.bool and right.uniform and right.dtype in FLOATS:
            nothing = self._step(right.dtype, "*", right, self._step(right.dtype, "constant", 0.0))
            return self._step(right.dtype, "where", inputs[0], right, nothing)
        return self._step(left.dtype, "*", left, right)

    def _clamp(self, name: str, dtype: torch.dtype, value: Any, *limits: Any) -> Value:
        low, high = {"clamp": (*limits, None, None)[:2], "clamp_min": (limits[0], None)}.get(name, (None, limits[0]))
        clamped = self._cast(value, dtype)
        if low is not None:
            clamped = self._step(dtype, "maximum", clamped, self._cast(low, dtype))
        if high is not None:
            clamped = self._step(dtype, "minimum", clamped, self._cast(high, dtype))
        return clamped


def _is_uniform(what: str, inputs: Sequence[Any]) -> bool:
    if what in ("load", "index"):
        return False
    return what in ("scalar", "key", "constant") or all(i.uniform for i in inputs)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


class Writer:
    """How operations are written in one language. `forms`: by operation, and by (operation, dtype) where that matters.

    A form's {0}, {1}, {2} are its inputs' variables, {T} is the name of the result's type.
    """

    types: ClassVar[dict[torch.dtype, str]] = {}
    forms: ClassVar[dict[Any, str]] = {}

    def expression(self, result: Value, what: str, inputs: Sequence[Any]) -> str:
        """The text of one operation on variables.

        Raises:
            Unsupported: the language has no such operation.
        """
        if what == "constant":
            return self.constant(inputs[0], result.dtype)
        form = self.forms.get((what, result.dtype), self.forms.get(what))
        if form is None:
            raise Unsupported(f"{what} of {result.dtype}")
        return form.format(*(i.name if isinstance(i, Value) else i for i in inputs), T=self.types[result.dtype])

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        raise NotImplementedError


def exact(value: Any) -> str:
    """A float as text that gives back every bit."""
    if not math.isfinite(value):
        raise Unsupported("a constant that is not finite")
    return repr(float(value))


def rounded(value: Any, dtype: torch.dtype) -> float:
    """What a Python number is as a value of `dtype`, as torch rounds it."""
    return torch.tensor(value, dtype=torch.float64).to(dtype).item()
