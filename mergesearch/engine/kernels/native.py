"""Programs in C++ for the CPU: one call makes many tensors, on all threads, with no Python in between.

The compiler on the machine makes a shared library of each program, kept on disk under a hash of its text and of the
processor. Results are written past the cache, which saves reading the memory that is about to be overwritten.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergesearch.engine.kernels.code import Code, Value, Writer, exact, rounded
from mergesearch.engine.kernels.symbols import Unsupported

counts: Counter[str] = Counter()
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
static inline double pick(int32_t c, double a, double b) { return c ? a : b; }
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
    types: ClassVar = {
        torch.float32: "float", torch.float64: "double", torch.int16: "int16_t", torch.int32: "int32_t",
        torch.int64: "int64_t", torch.bool: "int32_t",
    }  # fmt: skip
    forms: ClassVar = {
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
    for made, what, inputs in code.steps:
        if what == "load":
            right = _loaded(code.arguments[inputs[0]], f"x{inputs[0]}[i]")
        elif what == "cast" and inputs[0].dtype == torch.bool:
            right = writer.expression(made, "of truth", inputs)
        else:
            right = writer.expression(made, what, inputs)
        lines.append(f"            const {writer.types[made.dtype]} {made.name} = {right};")
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
    if out not in (torch.bfloat16, torch.float16, torch.float32):
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
    wide = f"(float){result.name}"
    made = f"narrow({wide})" if out == torch.bfloat16 else f"({_MEMORY[out]}){result.name}"
    # what the result is rounded to is finite where its exponent is not all ones
    seen = {
        torch.bfloat16: "(made[i] & 0x7f80) == 0x7f80", torch.float32: "(word(made[i]) & 0x7f800000u) == 0x7f800000u",
        torch.float16: "!(std::fabs((float)made[i]) <= 65504.0f)",
    }[out]  # fmt: skip
    return [
        f"            made[i] = {made};",
        f"            bad |= {seen};",
        "        }",
        "        put((char*)(out + at), (const char*)made, size * sizeof(made[0]));",
        "    }",
        "    return bad;",
        "}",
    ]


# --- building and calling -----------------------------------------------------------------------------------------


class Kernel:
    """A built program. Called with a `Table`, it makes the table's tensors and returns which were not finite."""

    chunk = CHUNK

    def __init__(self, code: Code, out: torch.dtype):
        self._work = function(text(code, out), "work", [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_int64,
                                                        *[ctypes.c_void_p] * 4])  # fmt: skip

    def __call__(self, table: Any) -> Tensor:
        """`table` has int64 `counts` (T,), `pointers` (T, 1 + arguments), `firsts` (T + 1,), float64 `scalars`
        (T or 1, S), int32 `keys` (T, K); (T,) bool comes back, true where a tensor has NaN or infinity."""
        bad = torch.zeros(len(table.counts), dtype=torch.uint8)
        following = torch.zeros(1, dtype=torch.int64)
        stride = 0 if len(table.scalars) == 1 else table.scalars.shape[1]
        arguments = (
            len(table.counts), table.counts.data_ptr(), table.pointers.data_ptr(), table.scalars.data_ptr(), stride,
            table.keys.data_ptr(), table.firsts.data_ptr(), bad.data_ptr(), following.data_ptr(),
        )  # fmt: skip
        on_all_threads(lambda: self._work(*arguments), int(table.firsts[-1]))
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
        RuntimeError: there is no compiler, or it failed.
    """
    found = getattr(ctypes.CDLL(str(_library(source))), name)
    found.argtypes, found.restype = list(arguments), result
    return found


def _library(source: str) -> Path:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    identity = "\0".join([source, str(compiler), *_FLAGS, *_NATIVE[0], _processor()])
    place = folder() / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.so"
    if place.is_file():
        counts["found"] += 1
        return place
    if compiler is None:
        raise RuntimeError("no C++ compiler here: install g++ or clang++")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        (Path(work) / "kernel.cpp").write_text(source)
        _build(compiler, Path(work))
        os.replace(Path(work) / "kernel.so", place)
    counts["compiled"] += 1
    return place


def _build(compiler: str, work: Path) -> None:
    for native in _NATIVE:
        command = [compiler, *_FLAGS, *native, str(work / "kernel.cpp"), "-o", str(work / "kernel.so")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[:500]}")


def folder() -> Path:
    """Where built kernels are kept."""
    chosen = os.environ.get("MERGESEARCH_KERNELS")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "mergesearch" / "kernels"


@cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
