"""Every fast path equals the plain definition, for every registered method: blocked, compiled, with kept statistics."""

from __future__ import annotations

import itertools
import logging
import math
import os
import subprocess
import sys
import textwrap
from typing import Annotated, Any

import pytest
import torch
from support import contract
from torch import Tensor

from mergesearch import methods
from mergesearch.engine.kernels import (
    Compiler,
    MethodCall,
    Operands,
    Runner,
    Statistics,
    TensorMerge,
    code,
    compiled,
    device,
    double_buffer,
    native,
    notices,
    orders,
    platforms,
    program,
    recording,
    runner,
    symbols,
    tables,
)
from mergesearch.errors import CandidateError
from mergesearch.methods import Method, mask_key, registry
from mergesearch.methods.listening import count_nonzero, kth_smallest, listening
from mergesearch.methods.sparse import rank_sums

MANY = 2**24
SHAPES = [(), (1,), (7,), (5, 6), (1, 4), (4, 1), (3, 4, 5), (0, 3)]
# in a default run two methods are compiled: one of averages, one with masks, thresholds and an election
COMPILED = ("linear", "dare_ties")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# methods whose few coefficients come from sums over the tensor, which each device adds up in an order of its own
SMALL_SUMS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "arcee_fusion")
# methods that can be split into statistics and an elementwise rest for tensors of any shape
SPLIT = [name for name in methods.names() if not methods.get(name).matrices]


def cases(method: Method) -> list[dict[str, Any]]:
    """The contract's settings, with a density that drops something where there is one."""
    found = list(contract.settings(method))
    if "density" in method.parameters:
        found = [{"density": 0.5, **given} for given in found]
    if "rescale" in method.parameters:
        found += [{"density": 0.5, "rescale": "l1", "weight": [0.4, -0.7, 1.1][: contract.count(method)]}]
    if "select_topk" in method.parameters:
        found += [{"select_topk": 0.4}]
    return found


def parents(method: Method, shape: tuple[int, ...], dtype: torch.dtype, base: bool, seed: int = 0) -> Operands:
    start, models = contract.inputs(method, shape, torch.float32, seed)
    names = contract.labels(method)
    return Operands(
        base=start.to(dtype) if base else None,
        models=tuple(m.to(dtype) for m in models),
        names=tuple((name, seed, shape, dtype) for name in ("base", *names)),
        masks=tuple(mask_key(0, name, "w") for name in names) if method.random else (),
    )


def defined(method: Method, operands: Operands, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What the plain definition gives, rounded once."""
    base = None if operands.base is None else operands.base.float()
    parameters = method.complete(given, contract.labels(method), "the test", has_base=base is not None)
    return method(base, [m.float() for m in operands.models], parameters, list(operands.masks) or None).to(dtype)


def made(run: Runner, method: Method, operands: Operands, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    has_base = operands.base is not None
    parameters = method.complete(given, contract.labels(method), "the test", has_base=has_base)
    out = torch.full_like(operands.models[0], math.nan, dtype=dtype)
    run.run(MethodCall(method, parameters), [TensorMerge(operands, out, "w")])
    return out


def on(operands: Operands, device: str) -> Operands:
    base = None if operands.base is None else operands.base.to(device)
    return Operands(base, tuple(m.to(device) for m in operands.models), operands.names, operands.masks)


def assert_within_an_ulp(got: Tensor, wanted: Tensor) -> None:
    """Equal but for the last bit, an element that is exactly 0 or untouched included."""
    whole = torch.int16 if got.element_size() == 2 else torch.int32
    steps = (got.contiguous().view(whole).long() - wanted.contiguous().view(whole).long()).abs()
    assert steps.numel() == 0 or steps.max() <= 1, f"{steps.max()} units in the last place"
    assert torch.equal(got == 0, wanted == 0)


def options(method: Method) -> list[bool]:
    return [True] if method.base == "required" else [True, False]


# --- blocked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.names())
def test_blocks_equal_the_definition(name):
    """bf16 parents; float32 and bf16 results; blocks that cut rows and tensors anywhere; with and without a base."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("never"), block=11)
    for shape, base in itertools.product(SHAPES, options(method)):
        for given in cases(method) if shape == (5, 6) else cases(method)[:1] + cases(method)[-1:]:
            operands = parents(method, shape, torch.bfloat16, base)
            for dtype in (torch.float32, torch.bfloat16):
                got, wanted = made(run, method, operands, given, dtype), defined(method, operands, given, dtype)
                assert torch.equal(got, wanted), (shape, given, base)


@pytest.mark.parametrize("name", [*methods.names(), "ties+lines", "dare_ties+svc"])
def test_no_method_needs_its_plain_definition(name, monkeypatch):
    """Each method here can be split into statistics and an elementwise rest: none is slow without anybody noticing.
    Those that decompose matrices are meant to be slow there, and nowhere else."""
    method = methods.get(name)
    monkeypatch.setattr(runner, "plain", lambda *_: pytest.fail("the plain definition was used"))
    run = Runner(Statistics(MANY, MANY), Compiler("never"))
    for given in cases(method):
        shape = (42,) if method.matrices else (6, 7)
        made(run, method, parents(method, shape, torch.bfloat16, True), given, torch.bfloat16)


@pytest.mark.parametrize("name", methods.names())
def test_degenerate_inputs_equal_the_definition(name):
    """Equal models, models that are the base, zeros."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("never"), block=16)
    for number, change in enumerate((lambda x: x * 0, lambda x: torch.ones_like(x))):
        operands = parents(method, (5, 6), torch.float32, True)
        same = tuple(change(m) for m in operands.models)
        operands = Operands(change(operands.base), same, [(number, i) for i in range(1 + len(same))], operands.masks)
        for given in cases(method):
            got, wanted = (f(method, operands, given, torch.float32) for f in (lambda *a: made(run, *a), defined))
            assert torch.equal(got, wanted), given


@pytest.mark.parametrize("name", methods.names())
def test_strided_tensors_equal_the_definition(name):
    """Views of fused tensors: transposed parents, a transposed destination."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("now" if name in COMPILED else "never"), block=11)
    operands = parents(method, (5, 6), torch.bfloat16, True)
    turned = [t.t().contiguous().t() for t in (operands.base, *operands.models)]
    strided = Operands(turned[0], tuple(turned[1:]), operands.names, operands.masks)
    given = cases(method)[-1]
    parameters = method.complete(given, contract.labels(method), "the test")
    out = torch.full((6, 5), math.nan).t()
    run.run(MethodCall(method, parameters), [TensorMerge(strided, out, "w")])
    assert torch.equal(out, defined(method, operands, given, torch.float32))


@pytest.mark.parametrize("name", methods.names())
def test_many_tensors_of_one_shape_equal_the_definition(name):
    """A group shares one recording; its statistics are each tensor's own. Twice: the second time they are kept ones."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("never"), block=16)
    tensors = [parents(method, (5, 6), torch.bfloat16, True, seed) for seed in range(4)]
    for given in cases(method):
        parameters = method.complete(given, contract.labels(method), "the test")
        wanted = [defined(method, one, given, torch.float32) for one in tensors]
        for _ in range(2):
            outs = [torch.full((5, 6), math.nan) for _ in tensors]
            run.run(
                MethodCall(method, parameters),
                [TensorMerge(one, out, "w") for one, out in zip(tensors, outs, strict=True)],
            )
            for out, one in zip(outs, wanted, strict=True):
                assert torch.equal(out, one), given


def test_a_method_that_cannot_be_split_is_merged_plainly(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    @methods.method(paper="none", family="interpolation", base="unused")
    def middle(base, models):
        """The median, which no elementwise operation gives."""
        return torch.stack(list(models)).median(0).values

    method = methods.get("middle")
    operands = parents(method, (5, 6), torch.bfloat16, False)
    run = Runner(Statistics(MANY, MANY), Compiler("never"))
    got = made(run, method, operands, {}, torch.bfloat16)
    assert torch.equal(got, torch.stack(list(operands.models)).median(0).values)


@pytest.mark.parametrize("body", [
    "x = models[0]; return x + x.float().cumsum(-1)",
    "x = models[0]; return x - x.mean()",
    "x = models[0].clone(); x.add_(1.0); return x",
    "x = models[0]; return x * 2 if (x > 0).any() else x",
    "x = models[0]; return x.flip(0)",
])  # fmt: skip
def test_what_is_not_elementwise_is_never_cut(body, monkeypatch):
    """A method's author who forgets to mark a statistic gets a slow method, not a wrong one."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    space: dict[str, Any] = {"methods": methods, "torch": torch}
    exec(f"def odd(base, models):\n    '''Odd.'''\n    {body}\n", space)
    methods.method(paper="none", family="interpolation", base="unused", name="odd")(space["odd"])
    method = methods.get("odd")
    operands = parents(method, (5, 6), torch.float32, False)
    got = made(Runner(Statistics(MANY, MANY), Compiler("never"), block=6), method, operands, {}, torch.float32)
    assert torch.equal(got, defined(method, operands, {}, torch.float32))


def test_masks_of_blocks_are_those_of_the_whole_beyond_the_first_window(monkeypatch):
    """Windows of 2^31 elements are too long for a test: with short ones blocks and the definition agree."""
    monkeypatch.setattr(methods.masks, "_WINDOW", 64)
    monkeypatch.setattr(methods.masks, "_CPU_BLOCK", 16)
    monkeypatch.setattr(program, "WINDOW", 32)
    monkeypatch.setattr(runner, "WINDOW", 32)
    method = methods.get("dare_linear")
    operands = parents(method, (300,), torch.float32, True)
    run = Runner(Statistics(MANY, MANY), Compiler("never"), block=16)
    got = made(run, method, operands, {"density": 0.5}, torch.float32)
    assert torch.equal(got, defined(method, operands, {"density": 0.5}, torch.float32))


def test_nan_names_the_tensor():
    method = methods.get("linear")
    operands = parents(method, (5, 6), torch.float32, False)
    operands.models[0][2, 3] = math.inf
    with pytest.raises(CandidateError, match="linear made NaN or infinity in w"):
        made(Runner(Statistics(MANY, MANY), Compiler("never")), method, operands, {}, torch.float32)


# --- compiled -----------------------------------------------------------------------------------------------------


def compiled_equals(name: str, settings: list[dict[str, Any]]) -> None:
    method = methods.get(name)
    compiler = Compiler("now")
    run = Runner(Statistics(MANY, MANY), compiler, block=1000)
    for given, dtype in itertools.product(settings, (torch.bfloat16, torch.float32)):
        for shape in ((33, 77), (2, 3)):
            operands = parents(method, shape, torch.bfloat16, True)
            wanted = defined(method, operands, given, dtype)
            assert torch.equal(made(run, method, operands, given, dtype), wanted)
    assert compiler.failed == {}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_equal_the_definition(name):
    compiled_equals(name, cases(methods.get(name))[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_every_compiled_kernel_equals_the_definition(name):
    found = cases(methods.get(name))
    compiled_equals(name, [found[0], found[-1]])


def test_other_numbers_compile_nothing_new():
    method = methods.get("linear")
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    made(run, method, parents(method, (33, 77), torch.bfloat16, False), {"weight": 0.3}, torch.bfloat16)
    before = sum(compiled.compiled_here().values())
    for weight, shape in ((0.4, (33, 77)), (1.7, (12, 5)), (-2.0, (999,)), (0.0, (3, 4, 5))):
        operands = parents(method, shape, torch.bfloat16, False)
        given = {"weight": [weight, 0.5, 1.0]}
        got, wanted = (
            made(run, method, operands, given, torch.bfloat16),
            defined(method, operands, given, torch.bfloat16),
        )
        assert torch.equal(got, wanted)
    assert sum(compiled.compiled_here().values()) == before


def test_the_background_takes_over():
    method = methods.get("linear")
    run = Runner(Statistics(MANY, MANY), Compiler("background"))
    operands = parents(method, (33, 77), torch.bfloat16, False)
    first = made(run, method, operands, {"weight": 0.3}, torch.bfloat16)
    run.compiler.wait()
    assert run.compiler._built, "nothing was compiled"
    assert torch.equal(made(run, method, operands, {"weight": 0.3}, torch.bfloat16), first)


@pytest.fixture
def said(monkeypatch, caplog):
    """The warnings of a process that has given none yet."""
    monkeypatch.setattr(notices, "_said", set())
    caplog.set_level(logging.WARNING, "mergesearch")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mergesearch")]


def both_dtypes_are_right(name: str) -> Compiler:
    """Merges by a method into two dtypes, and compares with the definition."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    operands = parents(method, (33, 77), torch.bfloat16, True)
    given = {"density": 0.5} if "density" in method.parameters else {}
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(made(run, method, operands, given, dtype), defined(method, operands, given, dtype))
    return run.compiler


@pytest.fixture
def no_orders(monkeypatch):
    """What counts and ranks is asked for anew, now and afterwards."""
    caches = (orders._built, orders._function, native._compiler)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch, no_orders, said):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert both_dtypes_are_right("ties")._built == {}
    assert said() == [
        "merging without compiled kernels, by torch's own operations: no C++ compiler here: no-such-compiler does not "
        "run (No such file or directory): install g++"
    ]


@pytest.mark.parametrize(
    ("faked", "words"),
    [
        ({"system": "Darwin"}, "they were tried on Linux x86_64, this is Darwin x86_64"),
        ({"machine": "aarch64"}, "they were tried on Linux x86_64, this is Linux aarch64"),
    ],
)
def test_on_a_platform_that_was_not_tried_nothing_is_built(faked, words, monkeypatch, no_orders, said):
    for what, value in {"system": "Linux", "machine": "x86_64", **faked}.items():
        monkeypatch.setattr(platforms.platform, what, lambda value=value: value)
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("something was compiled"))
    monkeypatch.delenv("MERGESEARCH_UNTRIED", raising=False)
    assert both_dtypes_are_right("ties")._built == {}
    assert said() == [
        f"merging without compiled kernels, by torch's own operations: {words}; MERGESEARCH_UNTRIED=1 builds them all "
        "the same"
    ]


def test_an_untried_platform_may_be_tried(monkeypatch, no_orders, said):
    monkeypatch.setattr(platforms.platform, "system", lambda: "Plan 9")
    monkeypatch.setenv("MERGESEARCH_UNTRIED", "1")
    assert len(both_dtypes_are_right("linear")._built) == 2
    assert said() == []


def test_a_compiler_that_was_not_tried_is_not_used():
    platforms.require_compiler("g++", "g++ 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.")
    with pytest.raises(notices.Unavailable, match=r"tried with gcc, clang is clang version 17: install g\+\+"):
        platforms.require_compiler("clang", "clang version 17\nTarget: x86_64")


@pytest.mark.parametrize(
    ("capability", "hip", "fine"), [((9, 0), None, True), ((8, 0), None, False), ((9, 0), "6", False)]
)
def test_gpus_that_were_not_tried(capability, hip, fine, monkeypatch):
    monkeypatch.setattr(platforms.platform, "system", lambda: "Linux")
    monkeypatch.setattr(platforms.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    if fine:
        platforms.require(torch.device("cuda", 0))
        return
    with pytest.raises(notices.Unavailable, match="tried on the NVIDIA H100, this is a GPU"):
        platforms.require(torch.device("cuda", 0))


def test_a_kernel_that_fails_to_build_turns_off_itself_alone(monkeypatch, said):
    """One dtype's kernel fails; the method is right all the same, the other dtype's and other methods' are built."""
    written = native.text
    broken = lambda code, out: "nonsense;" if out == torch.float32 else written(code, out)  # noqa: E731
    monkeypatch.setattr(native, "text", broken)
    compiler = both_dtypes_are_right("linear")
    assert [key[1] for key in compiler._built] == [torch.bfloat16]
    assert [key[1] for key in compiler.failed] == [torch.float32]
    monkeypatch.setattr(native, "text", written)
    method = methods.get("task_arithmetic")
    made(
        Runner(Statistics(MANY, MANY), compiler),
        method,
        parents(method, (9, 9), torch.bfloat16, True),
        {},
        torch.float32,
    )
    assert len(compiler._built) == 2
    assert len(said()) == 1
    assert "could not be built, its tensors are merged by torch's own operations: RuntimeError: " in said()[0]


# --- a tensor's bytes do not depend on what is made with it ---------------------------------------------------------


def alone_and_together(name: str, where: str) -> None:
    """Law 1: each tensor's bytes are the same in groups of any size, and whatever stands beside it."""
    method = methods.get(name)
    shapes = [(5, 6), (64, 33), (5, 6), (5, 6), (7,), (5, 6), (64, 33), (5, 6), (5, 6), (5, 6), (5, 6), (5, 6)]
    tensors = [on(parents(method, shape, torch.bfloat16, True, seed), where) for seed, shape in enumerate(shapes)]
    when = "now" if name in COMPILED or where != "cpu" else "never"
    for given in cases(method):
        call = MethodCall(method, method.complete(given, contract.labels(method), "the test"))
        results = []
        for size in (1, 2, 3, len(tensors)):
            run = Runner(Statistics(MANY, MANY), Compiler(when))
            outs = [torch.full_like(one.models[0], math.nan, dtype=torch.float32) for one in tensors]
            merges = [TensorMerge(one, out, "w") for one, out in zip(tensors, outs, strict=True)]
            for start in range(0, len(merges), size):
                run.run(call, merges[start : start + size])
            results.append(outs)
        for outs in results[1:]:
            assert all(torch.equal(out, alone) for out, alone in zip(outs, results[0], strict=True)), given


@pytest.mark.parametrize("name", methods.names())
def test_grouped_and_single_launches_are_equal(name):
    alone_and_together(name, "cpu")


@pytest.mark.parametrize("name", SPLIT)
def test_numbers_that_follow_from_statistics_do_not_depend_on_the_group(name):
    """In float64, before a rounding to the tensors' dtype hides that one was multiplied in another order."""
    method = methods.get(name)
    tensors = [parents(method, (5, 6), torch.bfloat16, True, seed) for seed in range(40)]
    for given in cases(method)[:1] + cases(method)[-1:]:
        call = MethodCall(method, method.complete(given, contract.labels(method), "the test"))
        numbers = symbols.numbers(method, call.parameters)
        values = []
        for groups in ([tensors], [[one] for one in tensors]):
            kept = Statistics(MANY, MANY)
            made_of = recording.Recording(call, tensors[0], kept)
            values.append([recording.Values(made_of, numbers, group, kept, i) for i, group in enumerate(groups)])
        (together,), alone = values
        wanted = torch.cat([one.scalars for one in alone])
        assert torch.equal(together.scalars.expand(len(wanted), -1), wanted)
        for rows, one in zip(together.rows, alone, strict=True):
            assert all(torch.equal(row, other) for row, other in zip(rows, one.rows[0], strict=True))


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", methods.names())
def test_grouped_and_single_launches_are_equal_on_cuda(name):
    alone_and_together(name, "cuda")


SECOND_START = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    import test_kernels as t
    from mergesearch import methods
    for name in ("linear", "ties"):
        method = methods.get(name)
        run = t.Runner(t.Statistics(t.MANY, t.MANY), t.Compiler("now"))
        t.made(run, method, t.parents(method, (33, 77), torch.bfloat16, True), {{}}, torch.bfloat16)
    print(t.compiled.compiled_here())
"""


def test_the_second_process_compiles_nothing(tmp_path):
    code = textwrap.dedent(SECOND_START).format(tests=os.path.dirname(__file__))
    environment = {**os.environ, "MERGESEARCH_KERNELS": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [eval(s) for s in said] == [{"compiled": 2, "found": 0}, {"compiled": 0, "found": 2}]


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["few", "many", "equal", "signed"])
def test_tables_give_the_very_kth(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40_000, generator=generator, dtype=torch.float64).to(dtype)
    values = {
        "few": (values * 50).round().abs() / 64,
        "many": values.abs(),
        "equal": torch.ones_like(values),
        "signed": values,
    }[kind]

    def blocks():
        return iter(values.split(1000))

    table = tables.Table(blocks, values.numel())
    ordered = values.sort().values
    for k in (1, 2, 399, 20_000, 20_001, 39_999, 40_000):
        assert torch.equal(table.smallest(k, blocks), ordered[k - 1])
        assert torch.equal(table.smallest(k, blocks), kth_smallest(values, k))
    with pytest.raises(ValueError, match="40001"):
        table.smallest(40_001, blocks)


@pytest.mark.parametrize("columns", [1, 7, 300, 2100, 20_000])
def test_ranks_equal_the_definition(columns):
    """With and without ties, in rows short and long, 16 and 32 bits wide."""
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(3, columns, generator=generator), torch.randint(-5, 5, (3, columns)).float()):
        assert orders.here(values)
        wanted = rank_sums.__wrapped__(values)
        got = orders.rank_sums(values)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_what_is_counted_in_pieces_is_what_is_sorted_whole():
    values = (torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 30).round() / 8
    found = tables._distinct(iter(values.split(999)), 2000)
    wanted = tables._distinct_sorted(iter(values.split(999)), 2000)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert tables._distinct(iter(values.split(999)), 20)[0] is None


def test_tables_stay_small():
    values = torch.randn(2**21, generator=torch.Generator().manual_seed(0)).abs()

    def blocks():
        return iter(values.split(2**16))

    table = tables.Table(blocks, values.numel())
    for k in range(1, 2**21, 2**15):
        table.smallest(k, blocks)
    assert table.nbytes < 0.2 * values.nbytes


def test_statistics_are_kept_in_bounded_memory():
    method = methods.get("ties")
    kept = Statistics(5000, 5000)
    run = Runner(kept, Compiler("never"))
    for seed in range(50):
        operands = parents(method, (20, 30), torch.bfloat16, True, seed)
        made(run, method, operands, {"density": 0.3}, torch.float32)
        assert kept.nbytes <= 10_000
    assert kept.nbytes > 0


def test_kept_statistics_are_not_computed_again(monkeypatch):
    method = methods.get("slerp")
    kept = Statistics(MANY, MANY)
    run = Runner(kept, Compiler("never"))
    operands = parents(method, (20, 30), torch.bfloat16, False)
    made(run, method, operands, {"t": 0.3}, torch.float32)
    monkeypatch.setattr(kept, "_compute", lambda *_: pytest.fail("computed again"))
    got = made(run, method, operands, {"t": 0.6}, torch.float32)
    assert torch.equal(got, defined(method, operands, {"t": 0.6}, torch.float32))


def test_listening_is_over_when_it_ends():
    with listening(lambda *_: 7):
        assert count_nonzero(torch.ones(3)) == 7
    assert count_nonzero(torch.ones(3)) == 3


# --- on a CUDA device ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", methods.names())
def test_kernels_on_cuda_equal_the_definition(name):
    """Over the contract's shapes and larger ones: within a unit in the last place of the definition on the CPU, with
    the same zeros."""
    method = methods.get(name)
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    for shape, base in itertools.product([*SHAPES, (33, 77), (64, 1024)], options(method)):
        for given in cases(method) if shape == (33, 77) else cases(method)[:1] + cases(method)[-1:]:
            here = parents(method, shape, torch.bfloat16, base)
            for dtype in (torch.float32, torch.bfloat16):
                wanted = defined(method, here, given, dtype)
                assert_within_an_ulp(made(run, method, on(here, "cuda"), given, dtype).cpu(), wanted)
    assert run.compiler.failed == {}


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", methods.names())
def test_cpu_and_cuda_make_the_same_bytes(name):
    """Law 1 across devices: what is scored on one kind of worker is exported by another."""
    method = methods.get(name)
    runs = [Runner(Statistics(MANY, MANY), Compiler("now")) for _ in range(2)]
    given = cases(method)[0]
    here = parents(method, (640, 512), torch.bfloat16, True)
    there = made(runs[1], method, on(here, "cuda"), given, torch.bfloat16).cpu()
    got = made(runs[0], method, here, given, torch.bfloat16)
    assert_within_an_ulp(there, got)
    if method.name not in SMALL_SUMS:
        assert torch.equal(there, got)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "della", "model_stock"])
@pytest.mark.parametrize("pinned", [True, False])
def test_parents_in_host_memory_make_the_same_candidate(name, pinned):
    """Through buffers so small that tensors are cut; several tensors, a tiny one among them."""
    method = methods.get(name)
    given = cases(method)[0]
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    run._buffers[torch.device("cuda", 0)] = double_buffer.DoubleBuffer(torch.device("cuda", 0), 2**20)
    tensors = [parents(method, shape, torch.bfloat16, True, i) for i, shape in enumerate([(900, 700), (5,), (300, 31)])]
    held = [on(t, "cpu") if not pinned else _pinned(t) for t in tensors]
    outs = [torch.full_like(t.models[0], math.nan, device="cuda") for t in tensors]
    parameters = method.complete(given, contract.labels(method), "the test")
    for _ in range(3):
        merges = [TensorMerge(t, out, "w") for t, out in zip(held, outs, strict=True)]
        run.run(MethodCall(method, parameters), merges)
        for tensor, out in zip(tensors, outs, strict=True):
            assert_within_an_ulp(out.cpu(), defined(method, tensor, given, torch.bfloat16))
            out.fill_(math.nan)


def _pinned(operands: Operands) -> Operands:
    models = tuple(m.pin_memory() for m in operands.models)
    return Operands(operands.base.pin_memory(), models, operands.names, operands.masks)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties"])
def test_each_tensor_is_merged_on_its_own_device(name):
    """A model whose layers lie on several devices, parents anywhere."""
    method = methods.get(name)
    given = cases(method)[0]
    tensors = [parents(method, (50, 70), torch.bfloat16, True, i) for i in range(4)]
    held = [on(t, device) for t, device in zip(tensors, ("cpu", "cuda", "cpu", "cuda"), strict=True)]
    outs = [torch.empty(50, 70, dtype=torch.bfloat16, device=d) for d in ("cpu", "cpu", "cuda", "cuda")]
    merges = [TensorMerge(t, out, "w") for t, out in zip(held, outs, strict=True)]
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    run.run(MethodCall(method, method.complete(given, contract.labels(method), "the test")), merges)
    for tensor, out in zip(tensors, outs, strict=True):
        assert_within_an_ulp(out.cpu(), defined(method, tensor, given, torch.bfloat16))


@pytest.mark.gpu
@cuda
def test_nan_on_cuda_names_the_tensor():
    method = methods.get("linear")
    operands = [on(parents(method, (5000,), torch.float32, False, i), "cuda") for i in range(3)]
    operands[1].models[0][4321] = math.inf
    merges = [TensorMerge(one, torch.empty_like(one.models[0]), f"w{i}") for i, one in enumerate(operands)]
    run = Runner(Statistics(MANY, MANY), Compiler("now"))
    with pytest.raises(CandidateError, match="linear made NaN or infinity in w1"):
        run.run(MethodCall(method, method.complete({}, contract.labels(method), "the test")), merges)


# --- the text of kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT)
def test_every_method_is_written_in_both_languages(name):
    """All but the programs with values for each row; the Triton text is Python that compiles."""
    method = methods.get(name)
    for given in cases(method):
        operands = parents(method, (6, 7), torch.bfloat16, True)
        how = MethodCall(method, method.complete(given, contract.labels(method), "the test"))
        found = recording.Recording(how, operands, Statistics(MANY, MANY)).program
        if found.rows:
            continue
        kinds = [torch.bfloat16] * len(found.parents) + [e.dtype for e in found.elements]
        written = code.trace(found, kinds)
        assert "work" in native.text(written, torch.bfloat16)
        compile(device.text(written, torch.bfloat16), "a kernel", "exec")


def test_a_recording_serves_other_numbers_but_not_behind_its_back(monkeypatch):
    """A method that takes a number's value out of its tensor is recorded anew for each value."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    one = Annotated[float | Tensor, methods.Parameter(meaning="a number")]

    def hidden(base, models, *, a: one = 1.0, b: one = 1.0):
        """Hidden."""
        return models[0] * torch.tensor(a.tolist() if isinstance(a, Tensor) else a) + models[0] * b

    hidden.__annotations__.update(a=one, b=one)
    methods.method(paper="none", family="interpolation", base="unused", name="hidden")(hidden)
    method = methods.get("hidden")
    run = Runner(Statistics(MANY, MANY), Compiler("never"))
    operands = parents(method, (5, 6), torch.float32, False)
    for given in ({"a": 0.3, "b": 0.2}, {"a": 0.7, "b": 0.2}, {"a": 0.7, "b": 0.9}, {"a": 0.3, "b": 0.2}):
        got = made(run, method, operands, given, torch.float32)
        assert torch.equal(got, defined(method, operands, given, torch.float32)), given
