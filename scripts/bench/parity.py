"""Compare every merge method with mergekit, or with what fusion-bench gave, and print results/parity.md.

    python -m scripts.bench.parity > results/parity.md
    python -m scripts.bench.parity --newer         the part about what mergekit lacks, in seconds

Needs the extra `parity`. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import platform
from collections.abc import Iterator

import torch

from mergesearch import methods
from mergesearch.mergekit.known import METHODS
from scripts.bench.shared import fusion_bench, oracle, tables

SHAPES = [(), (1,), (2,), (7,), (1, 4), (4, 1), (5, 6), (3, 4, 5), (300, 500)]
ABOUT = f"""
Random inputs of the shapes {", ".join(str(s) for s in SHAPES)}; 2 to 6 models (1 to 12 for task-vector methods); with
and without a zero task vector, many equal magnitudes, a base: 72 cases of 1,200,872 elements for each row; random
weights of mixed signs, densities, t, gamma, lambda from their whole useful ranges, both of every switch. mergekit gets
the same tensors in the same dtype.

- compared: the share of elements whose value rounding cannot decide (not where an election sums to zero, a threshold is
  met exactly, a direction has no length)
- equal: to the last bit
- largest: the largest difference, absolute, and in units of the dtype's precision at the largest number that enters
- our error, its error: the largest distance of our float32 result, and of mergekit's, from mergekit's own float64
  result on the same inputs

Random methods are compared at density 1, where nothing is drawn; tests compare their probabilities.
"""
ON_PURPOSE = {
    "arcee_fusion": "mergekit computes and returns float32 whatever it is given; compared off the threshold",
    "breadcrumbs": "mergekit erases the change of a tensor shorter than 1/density, ours keep one element",
    "breadcrumbs_ties": "as breadcrumbs",
    "dare_linear": "rescaled by 1/density (unbiased, as in the paper); `rescale: l1` is mergekit's rule; masks from a "
    "counter-based generator",
    "dare_ties": "as dare_linear",
    "della": "rescaled by 1/p; equal magnitudes share their rank; epsilon is narrowed where mergekit refuses it or "
    "fails (density +- epsilon outside (0, 1), rows of one element)",
    "della_linear": "as della",
    "karcher": "mergekit takes tensors with a norm of 1e-6 or less for zero, and counts a base as an input",
    "linear": "weights that sum to zero count as one, mergekit gives NaN",
    "multislerp": "weights whose directions cancel give zero, mergekit refuses",
    "nuslerp": "angles from float64 sums; mergekit's float32 loses its digits where vectors are nearly opposite",
    "ramplus_tl": "mergekit computes the scale in float32 and returns float32 whatever it is given",
    "sce": "where select_topk leaves less than one element, or nothing varies, mergekit gives the base",
    "slerp": "mergekit takes tensors with a norm below 1e-8 for zero",
    "ties": "every element equal to the smallest one kept is kept, mergekit keeps exactly k by an unstable sort",
}
NEWER = """
## What mergekit 0.1.5 lacks, against fusion-bench

Recorded once from fusion-bench {version} in an environment of its own (scripts/bench/record_fusion_bench.py says how),
in float64: 2 to 4 task vectors of 9 x 14 to 24 x 10. `largest`: the largest difference of our float64 result, as a
share of the largest change; `float32`: of our result from the same task vectors in float32.
"""
NEWER_FORMATS = {"method": "{}", "as in fusion-bench": "{}", "cases": "{}", "largest": "{:.1e}", "float32": "{:.1e}"}
ALONE = """
Different on purpose: directions below the numerical rank are left out, where fusion-bench scales noise up; none of
these task vectors has any. fusion-bench has none of the others. What holds them is a formula written out in float64 in
tests/test_methods_newer.py:

| method | compared with |
|---|---|
| regmean_free | the ridge regression by an inverse, for p 0, 0.5, 1; of adapters, the pseudo-inverse in their rows |
| star | the truncated and rescaled singular values by torch's own decomposition; each keeps its nuclear norm |
| resmerge | the paper's steps one by one over full matrices |
| lines | a + b t with the paper's a |
| dare_linear, dare_ties with q | the masks of the same seed divided by q |

regmean_free's loss at p = 1 beside that of fusion-bench's WUDI, which stops after 400 steps of Adam: {losses}.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newer", action="store_true", help="the part about what mergekit lacks, alone")
    if parser.parse_args().newer:
        _print_newer()
        return
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("mergekit", "torch")]
    print("# Every merge method against mergekit\n")
    print("    python -m scripts.bench.parity > results/parity.md\n")
    print(f"{datetime.date.today()}, {', '.join(versions)}, Python {platform.python_version()}, CPU.\n")
    print(ABOUT)
    print("| method | dtype | compared | equal | largest | units | our error | its error | different on purpose |")
    print("|---|---|---|---|---|---|---|---|---|")
    theirs = [name for name in methods.names() if name in (*METHODS, "uniform_soup")]
    for name, dtype in itertools.product(theirs, (torch.float32, torch.float64)):
        print(_row(name, dtype), flush=True)
    _print_newer()


def _print_newer() -> None:
    """The part about what mergekit lacks."""
    print(NEWER.format(version=fusion_bench.version()))
    labels = dict.fromkeys(one.label for one in fusion_bench.recorded())
    print(*tables.table(NEWER_FORMATS, map(_newer, labels), NEWER_FORMATS), sep="\n")
    print(ALONE.format(losses=", ".join(map(_losses, fusion_bench.stopped_early()))))


def _newer(label: str) -> tuple[str, str, int, float, float]:
    """A row for what fusion-bench gave under a label."""
    found = [one for one in fusion_bench.recorded() if one.label == label]
    wide, narrow = (max(_gap(one, dtype) for one in found) for dtype in (torch.float64, torch.float32))
    return found[0].method, label, len(found), wide, narrow


def _gap(one: fusion_bench.Recorded, dtype: torch.dtype) -> float:
    return float((one.ours(dtype).double() - one.theirs).abs().max() / one.theirs.abs().max())


def _losses(one: fusion_bench.Recorded) -> str:
    """Ours and theirs, as shares of the plain sum's."""

    def loss(merged: torch.Tensor) -> float:
        return float(sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in one.vectors))

    method = methods.get("regmean_free")
    parameters = method.complete({"p": 1.0}, [f"m{i}" for i in range(len(one.vectors))], "a case")
    ours = method(torch.zeros_like(one.theirs), one.vectors, parameters)
    whole = loss(torch.stack(one.vectors).sum(0))
    return f"{loss(ours) / whole:.2f} beside {loss(one.theirs) / whole:.2f} of the sum's ({one.case})"


def _row(name: str, dtype: torch.dtype) -> str:
    cases = list(_cases(name, dtype))
    found = [oracle.compare(case) for case in cases]
    total, compared, equal = (sum(getattr(d, c) for d in found) for c in ("total", "compared", "equal"))
    figures = f"{compared / total:.2%} | {equal / compared:.2%} | {max(d.largest for d in found):.1e}"
    units = max(d.units for d in found)
    start = f"| {name} | {str(dtype).removeprefix('torch.')} | {figures} | {units:.2g}"
    if dtype == torch.float64:
        return f"{start} | | | |"
    ours, its = (max(column) for column in zip(*(oracle.errors(case) for case in cases), strict=True))
    return f"{start} | {ours:.1e} | {its:.1e} | {ON_PURPOSE.get(name, '')} |"


def _cases(name: str, dtype: torch.dtype) -> Iterator[oracle.Case]:
    method = methods.get(name)
    flags = itertools.product(SHAPES, (False, True), (False, True), (False, True))
    for seed, (shape, zero, quantised, with_base) in enumerate(flags):
        case = oracle.make(
            "ties" if method.random else name,
            shape,
            _count(method, seed),
            dtype,
            seed,
            zero=zero,
            quantised=quantised,
            with_base=with_base,
        )
        yield _whole(name, case) if method.random else case


def _count(method: methods.Method, seed: int) -> int:
    least = min(method.max_models or 2, max(method.min_models, 1 if method.family == "task_vector" else 2))
    most = method.max_models or (12 if method.family == "task_vector" else 6)
    return least + seed % (most - least + 1)


def _whole(name: str, case: oracle.Case) -> oracle.Case:
    """The case of `ties` as one of a random method that drops nothing."""
    kept = {k: case.parameters[k] for k in ("weight", "lambda", "normalize", "rescale")}
    complete = methods.get(name).complete(kept, [f"m{i}" for i in range(len(case.models))], "a case")
    return oracle.Case(name, case.base, case.models, complete)


if __name__ == "__main__":
    main()
