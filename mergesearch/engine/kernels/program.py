"""Elementwise programs: what was recorded on symbols, as the text of a Python function over flat blocks.

The text is the program's identity: other numbers and other tensors give the same text, so one compiled kernel serves
them all. It runs as it stands on blocks that fit the cache, or compiled.

Why blocks give what the whole tensor gives. Each recorded step becomes one line that calls the same torch function on
the same operands (`_ProgramWriter._call`); numbers become s[i], held in float64 and converted to the recorded dtype
where that was another, which loses nothing, as a float64 that came from a float32 goes back to it. `_not_elementwise`
then runs the text once and lets only operations pass that torch itself marks as pointwise, or that make or copy
elements in their place. Of such a function element i depends on the elements i of its arguments alone, so a block of
the result is the function of the blocks. Random numbers are pointwise too: `uniform` is a hash of the element's index
(methods/masks.py), and a block's index is its offset k[0] plus the place in it. (To the last bit this holds for
operations that are rounded to the nearest, and the programs of the methods here have no others.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from mergesearch.engine.kernels.symbols import MaskSlot, Number, Symbol, Unsupported, symbols_in
from mergesearch.methods.masks import hash32, stream, to_unit

# what a block's temporaries may be of and still stay in the cache
BLOCK = 2**16
# an int32 index reaches no further, and a mask's stream words hold for this many elements
WINDOW = 2**30

_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "pow": "**", "and": "&", "or": "|", "xor": "^",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_HARMLESS = {
    "zeros_like", "ones_like", "full_like", "_to_copy", "scalar_tensor", "select", "arange", "clone", "detach", "alias",
    "full", "lift_fresh", "copy_", "lift_fresh_copy", "new_zeros", "new_ones", "new_full", "unsqueeze",
}  # fmt: skip


@dataclass(eq=False)
class Program:
    """Elementwise outputs of the parents' tensors and of scalars.

    Attributes:
        source: the text of `program(s, k, ...)`, which returns a tuple of the outputs.
        parents: what the arguments x0, x1, ... are: "base", or a model's number.
        elements: the statistics of the tensors' shape that are the arguments e0, e1, ...
        scalars: what s[0], s[1], ... are: 0-d tensors, or small symbols.
        rows: small values with dimensions, the arguments r0, r1, ...: they broadcast against the tensors.
        words: for each pair of k's numbers after the first (the offset) the model and the sample whose mask it keys.
    """

    source: str = ""
    parents: list[Any] = field(default_factory=list)
    elements: list[Symbol] = field(default_factory=list)
    scalars: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    words: list[tuple[int, int]] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        return [
            *(f"x{i}" for i in range(len(self.parents))),
            *(f"e{i}" for i in range(len(self.elements))),
            *(f"r{i}" for i in range(len(self.rows))),
        ]

    @property
    def run(self) -> Callable[..., tuple[Tensor, ...]]:
        """`run(s, k, *arguments)` gives the outputs."""
        return _function(self.source, "program")

    @property
    def kernel(self) -> Callable[..., Tensor]:
        """`kernel(out, s, k, *arguments)` writes the one output to `out` and says whether all of it is finite (0-d)."""
        return _function(self.source, "kernel")

    def keys(self, masks: Sequence[Any], offset: int) -> list[int]:
        """What the argument k holds for a block that begins at `offset` (which lies in one window with its end)."""
        window, start = divmod(offset, 2 * WINDOW)
        words = [start]
        for model, sample in self.words:
            words.extend(stream(masks[model], sample, window))
        return words


def make(outputs: Sequence[Symbol], parents: Sequence[Any]) -> Program:
    """The program that computes `outputs` from the parents in their order.

    Raises:
        Unsupported: something in it is not elementwise.
    """
    writer = _ProgramWriter(Program(parents=list(parents)))
    names = [writer.name(symbol) for symbol in outputs]
    program = writer.finish(names)
    problem = _not_elementwise(program.source, len(program.arguments), tuple(_dtypes(program)))
    if problem:
        raise Unsupported(f"{problem} is not elementwise")
    return program


class _ProgramWriter:
    def __init__(self, program: Program):
        self.program = program
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.indexed = False

    def name(self, symbol: Symbol) -> str:
        """The variable that holds a big symbol; what it is made of is written first."""
        for needed in _order(symbol, self.names):
            self.names[needed.number] = self._write(needed)
        return self.names[symbol.number]

    def _write(self, symbol: Symbol) -> str:
        if symbol.kind in ("base", "model"):
            at = self.program.parents.index("base" if symbol.kind == "base" else symbol.what)
            return self._line(f"x{at}.float()")
        if symbol.kind == "step":
            return self._line(self._call(symbol.what, symbol.args, symbol.kwargs))
        if symbol.what.how == "uniform":
            return self._line(self._uniform(*symbol.args, **symbol.kwargs))
        self.program.elements.append(symbol)
        return f"e{len(self.program.elements) - 1}"

    def _line(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"    {name} = {expression}")
        return name

    def _uniform(self, key: MaskSlot, shape: Any, sample: int = 0, device: Any = None, start: int = 0) -> str:
        if not isinstance(key, MaskSlot) or start != 0:
            raise Unsupported("random numbers of another kind than one for each element")
        self.indexed = True
        self.program.words.append((key.model, sample))
        at = 2 * len(self.program.words)
        return f"to_unit(hash32(index, k[{at - 1}], k[{at}]))"

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        name = resolve_name(function) or ""
        words = [self._argument(a) for a in args] + [f"{k}={self._argument(v)}" for k, v in kwargs.items()]
        method = name.removeprefix("torch.Tensor.")
        plain = method.strip("_").removeprefix("r") if method.startswith("__r") else method.strip("_")
        if method.startswith("__") and plain in _SYMBOLS and len(words) == 2:
            left, right = reversed(words) if method.startswith("__r") else words
            return f"{left} {_SYMBOLS[plain]} {right}"
        if not name.startswith("torch."):
            raise Unsupported(f"{function}")
        return f"{name}({', '.join(words)})"

    def _argument(self, value: Any) -> str:
        value = value.symbol if isinstance(value, Number) else value
        if isinstance(value, Symbol):
            return self.names[value.number] if value.big else self._small(value, value.value)
        if isinstance(value, Tensor):
            return self._small(value, value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._argument(v) for v in value)}]"
        if isinstance(value, float) and not math.isfinite(value):
            return f"float('{value}')"
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            return repr(value)
        if isinstance(value, torch.device):
            return "x0.device"
        raise Unsupported(f"a {type(value).__name__} takes part")

    def _small(self, value: Any, specimen: Tensor) -> str:
        kept, letter = (self.program.scalars, "s") if specimen.ndim == 0 else (self.program.rows, "r")
        if letter == "s" and not specimen.is_floating_point():
            raise Unsupported(f"a scalar is {specimen.dtype}")
        place = next((i for i, other in enumerate(kept) if other is value), None)
        if place is None:
            place = len(kept)
            kept.append(value)
        wide = letter == "r" or specimen.dtype == torch.float64
        text = f"s[{place}]" if letter == "s" else f"r{place}"
        return text if wide else f"{text}.to({specimen.dtype})"

    def finish(self, names: Sequence[str]) -> Program:
        program = self.program
        head = [f"def program(s, k, {', '.join(program.arguments)}):"]
        if self.indexed:
            line = "torch.arange(x0.numel(), dtype=torch.int32, device=x0.device)"
            head.append(f"    index = ({line} + k[0]).reshape(x0.shape)")
        tail = [f"    return ({', '.join(names)},)"]
        kernel = [
            f"def kernel(out, s, k, {', '.join(program.arguments)}):",
            *head[1:], *self.lines,
            f"    made = {names[0]}.to(out.dtype)",
            "    out.copy_(made)",
            "    return torch.isfinite(made).all()",
        ]  # fmt: skip
        program.source = "\n".join([*head, *self.lines, *tail, "", *kernel, ""])
        return program


def _order(symbol: Symbol, known: dict[int, str]) -> list[Symbol]:
    """The big symbols that `symbol` is made of and itself, each after what it needs; statistics are leaves."""
    ordered: list[Symbol] = []
    seen = set(known)
    stack = [(symbol, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            ordered.append(current)
        elif current.number not in seen:
            seen.add(current.number)
            stack.append((current, True))
            needed = symbols_in((current.args, current.kwargs)) if current.kind == "step" else []
            stack.extend((other, False) for other in reversed(needed) if other.big)
    return ordered


@functools.lru_cache(maxsize=512)
def _compiled_text(source: str) -> dict[str, Any]:
    space: dict[str, Any] = {"torch": torch, "hash32": hash32, "to_unit": to_unit}
    exec(compile(source, f"<merge program {hash(source) & 0xFFFFFFFF:08x}>", "exec"), space)
    return space


def _function(source: str, name: str) -> Callable[..., Any]:
    return _compiled_text(source)[name]


# --- is it elementwise? -------------------------------------------------------------------------------------------


class _ElementwiseCheck(TorchDispatchMode):
    """Remembers the first operation that is not elementwise."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would load torch._dynamo for it, which takes seconds
        return False

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reshapes_the_index = name in ("view", "_unsafe_view") and args[0].dtype == torch.int32
        if torch.Tag.pointwise not in func.tags and name not in _HARMLESS and not reshapes_the_index:
            self.problem = self.problem or name
        return func(*args, **(kwargs or {}))


def _dtypes(program: Program) -> list[torch.dtype]:
    small = [v.value if isinstance(v, Symbol) else v for v in program.rows]
    return [
        *(torch.float32 for _ in program.parents),
        *(e.dtype for e in program.elements),
        *(v.dtype for v in small),
    ]


@functools.lru_cache(maxsize=512)
def _not_elementwise(source: str, count: int, dtypes: tuple[torch.dtype, ...]) -> str:
    """The name of an operation in a program that is not elementwise; empty where all are."""
    arguments = [torch.ones(3, dtype=dtype) for dtype in dtypes]
    numbers = 1 + max([0, *(int(p.split("]")[0]) for p in source.split("s[")[1:])])
    words = 1 + max([0, *(int(p.split("]")[0]) for p in source.split("k[")[1:])])
    s, k = torch.ones(numbers, dtype=torch.float64), torch.zeros(words, dtype=torch.int32)
    watch = _ElementwiseCheck()
    try:
        with watch:
            outputs = _function(source, "program")(s, k, *arguments)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"({error})"
    if any(not isinstance(part, Tensor) or part.shape != (3,) for part in outputs):
        return "a change of shape"
    return watch.problem


# --- in blocks ----------------------------------------------------------------------------------------------------


def spans(shape: Sequence[int], flat: bool, size: int) -> list[tuple[int, int]]:
    """Ranges of the first dimension whose blocks have about `size` elements; none reaches over a window's end."""
    length, inner = (math.prod(shape), 1) if flat else (shape[0], max(1, math.prod(shape[1:])))
    step = max(1, size // inner)
    if flat:
        step = min(step, WINDOW)
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def cut(argument: Tensor, start: int, stop: int, length: int) -> Tensor:
    """The rows `start` to `stop` of an argument; all of one that broadcasts along the first dimension."""
    return argument[start:stop] if argument.ndim and argument.shape[0] == length else argument
