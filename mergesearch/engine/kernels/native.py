"""Programs in C++ for the CPU: one call makes many tensors, on all threads, with no Python in between.

The compiler on the machine makes a shared library of each program, kept on disk (built.py). Results are written past
the cache, which saves reading the memory that is about to be overwritten.

Why the result is the definition's to the last bit. `Cpp.forms` writes each operation of a `Code` as one C++ operation
on the same dtype; + - * / and std::sqrt are rounded to the nearest by IEEE 754, as torch's are. The flags keep the
compiler from making another number of them: -ffp-contract=off, no product and sum in one rounding; no -ffast-math, so
nothing is reordered and no division becomes a product; -fwrapv, as torch's integers wrap. -fno-math-errno and
-fno-trapping-math only drop what nobody looks at: errno and exception flags. `narrow` rounds float32 to bf16 to the
nearest, ties to even: it adds 0x7fff and the last bit that stays, then cuts; a NaN becomes 0x7fc0, as in torch. `pick`
chooses by bits, so that a NaN or a -0 passes unchanged; a truth value is 0 or -1 for that, and `& 1` where it becomes a
number. `maximum` and `minimum` give the NaN where one operand is one, as torch's do. An element's result depends on its
own inputs and its index alone, so spans, parts and threads do not show in it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mergesearch.engine.kernels import built, platforms
from mergesearch.engine.kernels.code import Code, Value, Writer, exact, rounded
from mergesearch.engine.kernels.notices import Unavailable
from mergesearch.engine.kernels.symbols import Unsupported

if TYPE_CHECKING:
    from mergesearch.engine.kernels.launch import Launch

_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fwrapv", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
# for this processor, with its widest vectors, as far as the compiler knows how to
_NATIVE = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], [])
# elements that one thread takes at a time
CHUNK = 2**15
_MEMORY = {
    torch.bfloat16: "uint16_t", torch.float16: "_Float16", torch.float32: "float", torch.float64: "double",
    torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t", torch.bool: "uint8_t",
}  # fmt: skip

_PRELUDE = """
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

static inline float widen(uint16_t half) { uint32_t u = uint32_t(half) << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t word(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline uint16_t narrow(float f) {
    uint32_t u = word(f);
    return f != f ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float floating(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
// truth is a mask, 0 or -1, and a choice is made of its bits: both vectorise where branches would not
static inline float pick(int32_t c, float a, float b) { return floating((word(a) & c) | (word(b) & ~c)); }
static inline double pick(int32_t c, double a, double b) {
    uint64_t x, y, kept = (uint64_t)(int64_t)c;
    memcpy(&x, &a, 8);
    memcpy(&y, &b, 8);
    x = (x & kept) | (y & ~kept);
    memcpy(&a, &x, 8);
    return a;
}
static inline int32_t pick(int32_t c, int32_t a, int32_t b) { return (a & c) | (b & ~c); }
static inline int64_t pick(int32_t c, int64_t a, int64_t b) { return c ? a : b; }
static inline void put(char* to, const char* from, int64_t bytes) {
#if defined(__AVX512F__)
    if (((uintptr_t)to | bytes) % 64 == 0) {
        for (int64_t i = 0; i < bytes; i += 64) _mm512_stream_si512((__m512i*)(to + i), _mm512_load_si512(from + i));
        return;
    }
#elif defined(__SSE2__)
    if (((uintptr_t)to | bytes) % 16 == 0) {
        for (int64_t i = 0; i < bytes; i += 16)
            _mm_stream_si128((__m128i*)(to + i), _mm_load_si128((const __m128i*)(from + i)));
        return;
    }
#endif
    memcpy(to, from, bytes);
}
"""

_DRIVER = """
extern "C" void work(int64_t tensors, const int64_t* counts, const int64_t* pointers, const double* scalars,
                     int64_t stride, const int32_t* keys, const int64_t* firsts, uint8_t* bad, int64_t* next) {
    const int64_t all = firsts[tensors];
    int64_t t = 0;
    for (int64_t c; (c = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < all;) {
        while (firsts[t + 1] <= c) t++;
        const int64_t start = (c - firsts[t]) * CHUNK, left = counts[t] - start;
        const int64_t n = left < CHUNK ? left : CHUNK;
        if (chunk(pointers + t * POINTERS, scalars + t * stride, keys + t * KEYS, start, n))
            __atomic_store_n(bad + t, 1, __ATOMIC_RELAXED);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
"""


class Cpp(Writer):
    types: ClassVar[dict[torch.dtype, str]] = {
        torch.float32: "float", torch.float64: "double", torch.int16: "int16_t", torch.int32: "int32_t",
        torch.int64: "int64_t", torch.bool: "int32_t",
    }  # fmt: skip
    forms: ClassVar[dict[Any, str]] = {
        **{sign: f"{{0}} {sign} {{1}}" for sign in ("+", "-", "*", "/", "&", "|", "^", ">>", "<<")},
        **{sign: f"-(int32_t)({{0}} {sign} {{1}})" for sign in ("<", "<=", ">", ">=", "==", "!=")},
        "where": "pick({0}, {1}, {2})", "not": "~{0}", "neg": "-{0}", "cast": "({T}){0}",
        ("cast", torch.bool): "-(int32_t)({0} != 0)", "of truth": "({T})({0} & 1)",
        "maximum": "pick(-(int32_t)({1} > {0}) | -(int32_t)({1} != {1}), {1}, {0})",
        "minimum": "pick(-(int32_t)({1} < {0}) | -(int32_t)({1} != {1}), {1}, {0})",
        ("abs", torch.float32): "std::fabs({0})", ("abs", torch.float64): "std::fabs({0})",
        ("abs", torch.int32): "{0} < 0 ? -{0} : {0}", ("sqrt", torch.float32): "std::sqrt({0})",
        ("sqrt", torch.float64): "std::sqrt({0})", "scalar": "s[{0}]", "key": "k[{0}]", "index": "(int32_t)(at + i)",
        "bitwise_not": "~{0}",
    }  # fmt: skip

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        if dtype == torch.bool:
            return "-1" if value else "0"
        if not dtype.is_floating_point:
            return f"({self.types[dtype]}){int(value)}ll"
        return f"({self.types[dtype]}){exact(rounded(value, dtype))}"


def text(code: Code, out: torch.dtype) -> str:
    """The C++ of a program whose result is held in `out`.

    Raises:
        Unsupported: C++ has no such operation or dtype here.
    """
    writer, lines = Cpp(), []
    for variable, what, inputs in code.steps:
        if what == "load":
            right = _loaded(code.arguments[inputs[0]], f"x{inputs[0]}[i]")
        elif what == "cast" and inputs[0].dtype == torch.bool:
            right = writer.expression(variable, "of truth", inputs)
        else:
            right = writer.expression(variable, what, inputs)
        lines.append(f"            const {writer.types[variable.dtype]} {variable.name} = {right};")
    return "\n".join([_PRELUDE, *_sizes(code), *_head(code, out), *lines, *_tail(code.result, out), _DRIVER])


def _loaded(dtype: torch.dtype, place: str) -> str:
    if dtype not in _MEMORY:
        raise Unsupported(f"tensors of {dtype}")
    if dtype == torch.bool:
        return f"-(int32_t)({place} != 0)"
    return f"widen({place})" if dtype == torch.bfloat16 else f"(float){place}" if dtype == torch.float16 else place


def _sizes(code: Code) -> list[str]:
    return [
        f"static const int64_t CHUNK = {CHUNK}, POINTERS = {1 + len(code.arguments)}, KEYS = {code.keys}, PART = 2048;"
    ]


def _head(code: Code, out: torch.dtype) -> list[str]:
    if out not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise Unsupported(f"results of {out}")
    arguments = [
        f"        const {_MEMORY[dtype]}* __restrict x{i} = (const {_MEMORY[dtype]}*)p[{i + 1}] + at;"
        for i, dtype in enumerate(code.arguments)
    ]
    return [
        "static bool chunk(const int64_t* p, const double* s, const int32_t* k, int64_t start, int64_t n) {",
        f"    alignas(64) {_MEMORY[out]} made[PART];",
        f"    {_MEMORY[out]}* out = ({_MEMORY[out]}*)p[0];",
        "    uint32_t bad = 0;",
        "    for (int64_t done = 0; done < n; done += PART) {",
        "        const int64_t at = start + done, size = n - done < PART ? n - done : PART;",
        *arguments,
        "#pragma GCC ivdep",
        "        for (int32_t i = 0; i < (int32_t)size; i++) {",
    ]


def _tail(result: Value, out: torch.dtype) -> list[str]:
    narrowed = f"narrow((float){result.name})" if out == torch.bfloat16 else f"({_MEMORY[out]}){result.name}"
    # what the result is rounded to is finite where its exponent is not all ones
    seen = {
        torch.bfloat16: "(made[i] & 0x7f80) == 0x7f80", torch.float32: "(word(made[i]) & 0x7f800000u) == 0x7f800000u",
        torch.float16: "!(std::fabs((float)made[i]) <= 65504.0f)",
        torch.float64: "!(std::fabs(made[i]) <= 1.7976931348623157e308)",
    }[out]  # fmt: skip
    return [
        f"            made[i] = {narrowed};",
        f"            bad |= {seen};",
        "        }",
        "        put((char*)(out + at), (const char*)made, size * sizeof(made[0]));",
        "    }",
        "    return bad;",
        "}",
    ]


# --- building and calling -----------------------------------------------------------------------------------------


class CppKernel:
    """A built program, see `launch.Kernel`."""

    chunk = CHUNK

    def __init__(self, code: Code, out: torch.dtype):
        self._work = function(text(code, out), "work", [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int64,
                                                        *[ctypes.c_void_p] * 4])  # fmt: skip

    def __call__(self, launch: Launch) -> Tensor:
        bad = torch.zeros(len(launch.counts), dtype=torch.uint8)
        following = torch.zeros(1, dtype=torch.int64)
        stride = 0 if len(launch.scalars) == 1 else launch.scalars.shape[1]
        arguments = (
            len(launch.counts), launch.counts.data_ptr(), launch.pointers.data_ptr(), launch.scalars.data_ptr(), stride,
            launch.keys.data_ptr(), launch.firsts.data_ptr(), bad.data_ptr(), following.data_ptr(),
        )  # fmt: skip
        on_all_threads(lambda: self._work(*arguments), int(launch.firsts[-1]))
        return bad.bool()


def on_all_threads(work: Callable[[], Any], parts: int) -> None:
    """Calls `work` on as many threads as torch uses, this one among them, at most one for each part."""
    others = [_threads(torch.get_num_threads()).submit(work) for _ in range(min(torch.get_num_threads(), parts) - 1)]
    work()
    for other in others:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="mergesearch-merge")


def function(source: str, name: str, arguments: Sequence[Any], result: Any = None) -> Any:
    """A function of a C++ source as `ctypes` calls it, compiled or found on disk.

    Raises:
        Unavailable: nothing is compiled on this machine.
        RuntimeError: the compiler failed.
    """
    platforms.require(torch.device("cpu"))
    command, version = _compiler(os.environ.get("CXX"))
    flags = [*_FLAGS, *(flag for native in _NATIVE for flag in ("|", *native))]
    key = built.key_of(source, *command, version, *flags, _processor())
    library = built.load(key, lambda place: _compile(command, source, place))
    called = getattr(library, name)
    called.argtypes, called.restype = list(arguments), result
    return called


@cache
def _compiler(chosen: str | None) -> tuple[tuple[str, ...], str]:
    """How the C++ compiler is called, and what it says of its version. `chosen`: the environment's CXX."""
    command = shlex.split(chosen) if chosen else list(filter(None, map(shutil.which, ("g++", "c++", "clang++"))))[:1]
    if not command:
        raise Unavailable("no C++ compiler here: install g++")
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"no C++ compiler here: {command[0]} does not run ({error.strerror}): install g++") from error
    platforms.require_compiler(shlex.join(command), done.stdout)
    return tuple(command), done.stdout.partition("\n")[0]


def _compile(command: Sequence[str], source: str, place: Path) -> None:
    """Writes the library of a source to `place`."""
    text = place.with_suffix(".cpp")
    text.write_text(source, encoding="utf-8")
    said = ""
    for native in _NATIVE:
        line = [*command, *_FLAGS, *native, str(text), "-o", str(place)]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode == 0:
            return
        said = done.stderr.strip()[:500]
    raise RuntimeError(f"{command[0]} failed: {said}")


@cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
