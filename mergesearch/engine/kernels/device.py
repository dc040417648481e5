"""Programs in Triton for CUDA devices: one launch makes all tensors that share a program, however many there are.

Why the result is the definition's to the last bit. `Triton.forms` writes each operation of a `Code` as one operation on
the same dtype, and the kernel is built with `enable_fp_fusion=False`, so that no product and sum share a rounding.
Where Triton's own operation is not the nearest number another stands in its place: `tl.sqrt_rn`; `divide` and `by_one`
for the quotient (their derivation is beside them); -x as x * -1, as Triton subtracts from 0 and loses the sign of 0;
minimum and maximum by comparison, with torch's NaN. "index" is the element's place in its span: with the offset k[0] it
gives the mask's counter, so that a mask does not depend on how a tensor is cut. A program instance reads and writes its
own BLOCK elements of one tensor, so which tensors share a launch does not show in any of them.
"""

from __future__ import annotations

import importlib
import linecache
import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mergesearch.engine.kernels import built
from mergesearch.engine.kernels.code import Code, Writer, exact, rounded
from mergesearch.engine.kernels.notices import Unavailable
from mergesearch.engine.kernels.symbols import Unsupported

if TYPE_CHECKING:
    from mergesearch.engine.kernels.launch import Launch

# elements of a program instance: 16 bytes of bf16 for each of its threads
BLOCK, WARPS = 512, 2
_TYPES = {
    torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32",
    torch.float64: "tl.float64", torch.int16: "tl.int16", torch.int32: "tl.int32", torch.int64: "tl.int64",
    torch.bool: "tl.int1",
}  # fmt: skip

_HEAD = """import triton
import triton.language as tl


@triton.jit
def along(pointer, start, lane, EVEN: tl.constexpr, ALIGNED: tl.constexpr):
    if EVEN and ALIGNED:
        return tl.multiple_of(pointer + start + lane, 16)
    return pointer + start + lane


@triton.jit
def fetch(pointers, left, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=left, eviction_policy="evict_first")

"""


# Division. CUDA's own checks for operands near the ends of the range and sends every 0 through a branch, which takes
# three times as long; these are its steps without the check (Markstein 1990, "Computation of elementary functions on
# the IBM RISC System/6000 processor").
#
# divide: `near` is 1/b to within two ulps. 1 - b near is exact in one fma but for its last rounding, and r = near + (1
# - b near) near is 1/b with the error squared. first = a r is then a few ulps off a/b, `better` one at most. For such a
# quotient the remainder a - b better fits a float32, so that one fma gives it exactly, and better plus the remainder
# times r is a/b, rounded once. An infinite or zero `first` would become NaN on the way, and is kept.
#
# by_one: b is one number for all elements, and r = 1/b comes rounded to the nearest (tl.div_rn, once an instance): then
# one step is enough. An infinite quotient becomes NaN: not finite either way.
#
# Both give the nearest quotient for each of 2 * 10^7 random pairs of significands. Scaling by powers of two changes
# nothing as long as no remainder underflows: for quotients below 2^-100 the last bit may differ.
_DIVISION = """
@triton.jit
def by_one(a, b, r):
    first = a * r
    # a product with -1: Triton's minus is a subtraction from 0, which loses the sign of 0
    return tl.fma(tl.fma(b, first, a * -1.0) * -1.0, r, first)


@triton.jit
def divide(a, b):
    minus = b * -1.0
    near = 1.0 / b
    r = tl.fma(tl.fma(minus, near, 1.0), near, near)
    first = a * r
    better = tl.fma(tl.fma(minus, first, a), r, first)
    best = tl.fma(tl.fma(minus, better, a), r, better)
    return tl.where(first * 0.5 == first, first, best)

"""


class Triton(Writer):
    types: ClassVar[dict[torch.dtype, str]] = _TYPES
    forms: ClassVar[dict[Any, str]] = {
        **{sign: f"{{0}} {sign} {{1}}" for sign in ("+", "-", "*", "&", "|", "^", ">>", "<<", "<", "<=", ">", ">=",
                                                    "==", "!=")},
        ("/", torch.float32): "divide({0}, {1})", ("/", torch.float64): "{0} / {1}",
        ("sqrt", torch.float32): "tl.sqrt_rn({0})", ("sqrt", torch.float64): "tl.sqrt({0})",
        "where": "tl.where({0}, {1}, {2})",
        ("where", torch.bool): "({0} & {1}) | (~{0} & {2})",
        "not": "~{0}", "neg": "{0} * -1", "abs": "tl.abs({0})", "bitwise_not": "~{0}",
        "cast": "{0}.to({T})", ("cast", torch.bool): "{0} != 0",
        "maximum": "tl.where(({1} > {0}) | ({1} != {1}), {1}, {0})",
        "minimum": "tl.where(({1} < {0}) | ({1} != {1}), {1}, {0})",
        "scalar": "tl.load(s + {0})", "key": "tl.load(k + {0})", "index": "start + lane",
    }  # fmt: skip

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        plain = exact(rounded(value, dtype)) if dtype.is_floating_point else str(int(value))
        return f"tl.full([BLOCK], {plain}, {self.types[dtype]})"


def text(code: Code, out: torch.dtype) -> str:
    """The Triton source of a program whose result is held in `out`.

    Raises:
        Unsupported: Triton has no such operation or dtype here.
    """
    if out not in (torch.bfloat16, torch.float16, torch.float32):
        raise Unsupported(f"results of {out}")
    writer, lines = Triton(), []
    for variable, what, inputs in code.steps:
        right = (
            _loaded(code, inputs[0], variable.dtype) if what == "load" else writer.expression(variable, what, inputs)
        )
        if what == "/" and variable.dtype == torch.float32 and inputs[1].uniform:
            lines.append(f"    r{variable.name} = tl.div_rn({inputs[1].name} * 0 + 1.0, {inputs[1].name})")
            right = f"by_one({inputs[0].name}, {inputs[1].name}, r{variable.name})"
        lines.append(f"    {variable.name} = {right}")
    names = ["out", *(f"x{i}" for i in range(len(code.arguments)))]
    types = [out, *code.arguments]
    pointers = [f"{n} = tl.load(row + {i + 2}).to(tl.pointer_type({_TYPES[t]}))"
                for i, (n, t) in enumerate(zip(names, types, strict=True))]  # fmt: skip
    return "\n".join([
        _HEAD,
        _DIVISION,
        "@triton.jit",
        f"def part({', '.join(names)}, s, k, start, n, bad, BLOCK: tl.constexpr, EVEN: tl.constexpr, "
        "ALIGNED: tl.constexpr):",
        "    lane = tl.arange(0, BLOCK)",
        "    left = start + lane < n",
        *lines,
        f"    made = {code.result.name}.to({_TYPES[out]})",
        "    wide = made.to(tl.float32)",
        "    wrong = ~(tl.abs(wide) < float('inf'))",
        "    there = along(out, start, lane, EVEN, ALIGNED)",
        "    if EVEN:",
        "        tl.store(there, made)",
        "    else:",
        "        tl.store(there, made, mask=left)",
        "        wrong = wrong & left",
        "    tl.store(bad + tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], 1, tl.int8), mask=wrong)",
        "",
        "",
        '@triton.jit(do_not_specialize=["stride"])',
        "def work(table, places, scalars, stride, keys, bad, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):",
        "    at = tl.program_id(0)",
        "    t = tl.load(places + at)",
        f"    row = table + t * {len(names) + 2}",
        "    start = (at - tl.load(row).to(tl.int32)) * BLOCK",
        "    n = tl.load(row + 1).to(tl.int32)",
        *(f"    {line}" for line in pointers),
        "    s = scalars + t * stride",
        f"    k = keys + t * {code.keys}",
        "    if start + BLOCK <= n:",
        f"        part({', '.join(names)}, s, k, start, n, bad + t, BLOCK, True, ALIGNED)",
        "    else:",
        f"        part({', '.join(names)}, s, k, start, n, bad + t, BLOCK, False, ALIGNED)",
        "",
    ])  # fmt: skip


def _loaded(code: Code, number: int, dtype: torch.dtype) -> str:
    held = code.arguments[number]
    if held not in _TYPES:
        raise Unsupported(f"tensors of {held}")
    if held == torch.bool:
        raise Unsupported("statistics that are truth values")
    loaded = f"fetch(along(x{number}, start, lane, EVEN, ALIGNED), left, EVEN)"
    return loaded if held == dtype else f"{loaded}.to({_TYPES[dtype]})"


@dataclass
class _TryOut:
    rows: Tensor
    places: Tensor
    scalars: Tensor
    keys: Tensor
    aligned: bool = True


class TritonKernel:
    """A built program, see `launch.Kernel`.

    Raises:
        Unavailable: there is no Triton here.
    """

    chunk = BLOCK

    def __init__(self, code: Code, out: torch.dtype):
        self._source = text(code, out)
        self.work: Any = load(self._source).work
        self._code, self._out = code, out

    def try_on(self, device: torch.device) -> None:
        """Builds for a device and runs there once, on memory of its own: what fails fails here, before a candidate.

        Triton keeps what it builds; other processes wait, and find it.
        """
        capability = torch.cuda.get_device_capability(device)
        with built.lock(built.key_of(self._source, _version(), str(capability))):
            self._run_once(device)

    def _run_once(self, device: torch.device) -> None:
        code, size = self._code, BLOCK
        tensors = [torch.ones(size, dtype=dtype, device=device) for dtype in (self._out, *code.arguments)]
        rows = torch.tensor([[0, size, *(t.data_ptr() for t in tensors)]], device=device)
        self(_TryOut(
            rows, torch.zeros(1, dtype=torch.int32, device=device),
            torch.ones(1, max(1, code.scalars), dtype=torch.float64, device=device),
            torch.zeros(1, code.keys, dtype=torch.int32, device=device),
        ))  # fmt: skip
        torch.cuda.synchronize(device)

    def __call__(self, launch: Launch | _TryOut) -> Tensor:
        """Nothing waits for the device. `launch.rows` is int64 (T, 3 + arguments): first chunk, elements, pointers;
        `launch.places` int32: the tensor of each chunk; `launch.aligned`: all pointers are multiples of 16."""
        bad = torch.zeros(len(launch.rows), dtype=torch.int8, device=launch.rows.device)
        stride = 0 if len(launch.scalars) == 1 else launch.scalars.shape[1]
        with torch.cuda.device(launch.rows.device):
            self.work[(len(launch.places),)](
                launch.rows, launch.places, launch.scalars, stride, launch.keys, bad, BLOCK=BLOCK,
                ALIGNED=launch.aligned, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return bad != 0


def _version() -> str:
    """Triton's version.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        return importlib.import_module("triton").__version__
    except ImportError as error:
        raise Unavailable("Triton is not installed here: pip install triton") from error


def load(source: str) -> ModuleType:
    """The module of a Triton source.

    Triton reads the text of functions through `inspect`, by the name of their file. The file is there for debuggers:
    what is run, and what Triton reads, is `source` itself.

    Raises:
        Unavailable: there is no Triton here.
    """
    kept = built.folder() / f"triton-{_version()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    os.utime(kept)  # its last use, for `built.prune`
    os.environ.setdefault("TRITON_CACHE_DIR", str(kept))
    name = f"mergesearch_{built.key_of(source)[:24]}"
    place = str(built.write(f"{name}.py", source))
    # without a time of change, so that nobody reads the file in its place
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    module = ModuleType(name)
    module.__file__ = place
    exec(compile(source, place, "exec"), module.__dict__)
    return module
