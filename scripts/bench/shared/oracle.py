"""mergekit as an oracle: our parameters in its terms, random cases, and where a comparison means something.

It is called, never read. Used by test_methods_parity.py and by scripts/bench/parity.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mergesearch import methods
from mergesearch.mergekit.known import METHODS
from mergesearch.methods import adaptive, common, interpolation, mask_key, sparse, task_vector

# methods that mergekit 0.1.5 lacks are compared elsewhere, see newer.py
DETERMINISTIC = [
    name for name in methods.names() if name in (*METHODS, "uniform_soup") and not methods.get(name).random
]
# mergekit takes the first of the two as its base
FIRST_IS_BASE = {"slerp", "nearswap", "arcee_fusion"}
NAMES = {
    ("nuslerp", "flatten"): "nuslerp_flatten",
    ("nuslerp", "row_wise"): "nuslerp_row_wise",
    ("multislerp", "normalize"): "normalize_weights",
}
# what mergekit has no parameter for
UNKNOWN: dict[str, set[str]] = {
    "sce": {"weight", "lambda", "normalize"},
    "ram": {"weight", "lambda"},
    "ramplus_tl": {"weight", "lambda"},
}
# where the default search range is not what is worth comparing
RANGES = {"gamma": (0.0, 0.4)}
# a difference of this many units of the dtype's precision, on the scale of the largest number involved
UNITS = 32
# mergekit computes these in float32 whatever it is given
NARROW = {"arcee_fusion", "ramplus_tl"}
EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: inputs, our parameters (complete), and where the result is determined (off the ties)."""

    method: str
    base: Tensor | None
    models: list[Tensor]
    parameters: dict[str, Any]

    def ours(self) -> Tensor:
        keys = [mask_key(0, f"m{i}", "w") for i in range(len(self.models))]
        return methods.get(self.method)(self.base, self.models, self.parameters, keys)

    def theirs(self, dtype: torch.dtype | None = None) -> Tensor:
        return merge_tensors(self.method, self.base, self.models, self.parameters, dtype)


def merge_tensors(
    method: str, base: Tensor | None, models: list[Tensor], parameters: dict[str, Any], dtype: torch.dtype | None = None
) -> Tensor:
    """mergekit's result in the inputs' dtype."""
    from mergekit.merge_methods import merge_tensors as oracle

    theirs = "linear" if method == "uniform_soup" else method
    unknown = {"samples", "q"} | UNKNOWN.get(method, set())
    given = {NAMES.get((method, k), k): _translate(k, v) for k, v in parameters.items() if k not in unknown}
    given = {"weight": 1.0} if method == "uniform_soup" else given
    uses_base = base is not None and methods.get(method).base != "unused"
    tensors = [base, *models] if uses_base else models
    index = 0 if uses_base or method in FIRST_IS_BASE else None
    dtype = dtype or models[0].dtype
    return oracle(tensors, theirs, parameters=given, base_index=index, dtype=dtype).to(dtype)


def _translate(key: str, value: Any) -> Any:
    return {"none": False, "l1": True}[value] if key == "rescale" else value


def make(
    method: str,
    shape: tuple[int, ...],
    count: int,
    dtype: torch.dtype,
    seed: int,
    *,
    zero: bool = False,
    quantised: bool = False,
    with_base: bool = True,
    scale: float = 0.1,
) -> Case:
    """A random case. `zero`: one task vector is 0. `quantised`: magnitudes and models repeat, so many are equal.

    Weights are multiples of 1/8 from -1 to 2, so no divisor is a rounding error; where a density would cut between
    equal magnitudes, or a share between equal variances, it is 1 (what a tie does there is undefined in mergekit).
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(count)]
    if quantised:
        base, deltas = (base * 8).round() / 8, [(d / scale * 2).round() / 16 for d in deltas]
    if zero:
        deltas[0] = torch.zeros_like(deltas[0])
    models = [(base + d).to(dtype) for d in deltas]
    known = methods.get(method)
    given = {k: _draw(known, k, count, generator) for k in known.parameters if k not in UNKNOWN.get(method, ())}
    start = base.to(dtype) if known.base == "required" or with_base else None
    complete = known.complete(given, [f"m{i}" for i in range(count)], "a case")
    return Case(method, start, models, _off_the_ties(known.name, start, models, complete))


def _draw(known: methods.Method, key: str, count: int, generator: torch.Generator) -> Any:
    parameter = known.parameters[key]
    if parameter.kind == "bool":
        return _index(2, generator) == 1
    if parameter.choices:
        return parameter.choices[_index(len(parameter.choices), generator)]
    if key == "weight":
        # nuslerp's angle and multislerp's direction have poles where weights cancel
        low = 1 if known.name in ("nuslerp", "multislerp") else -8
        return [(low + _index(17 - low, generator)) / 8 for _ in range(count)]
    span = RANGES.get(key, parameter.search)
    if span is None:
        return parameter.default
    values = [_between(span, generator) for _ in range(count if parameter.per_model else 1)]
    return values if parameter.per_model else values[0]


def _index(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))


def _between(ends: tuple[float, float], generator: torch.Generator) -> float:
    return ends[0] + (ends[1] - ends[0]) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _off_the_ties(method: str, base: Tensor | None, models: list[Tensor], parameters: dict[str, Any]) -> dict[str, Any]:
    if method == "sce":
        variance = adaptive.spread([m.double() - base.double() for m in models])
        return {**parameters, "select_topk": _share_off_the_ties(variance, parameters["select_topk"])}
    if "density" not in parameters:
        return parameters
    gammas = parameters.get("gamma", [0.0] * len(models))
    rows = zip(models, parameters["density"], gammas, strict=True)
    return {**parameters, "density": [_density_off_the_ties(m - base, p, g) for m, p, g in rows]}


def _density_off_the_ties(d: Tensor, density: float, gamma: float) -> float:
    size, n = d.abs().flatten().sort(descending=True).values, d.numel()
    top, kept = sparse.outlier_count(n, density, gamma), task_vector.keep_count(n, density)
    cuts = [at for at in (top, top + kept) if 0 < at < n]
    clear = all(size[at - 1] > size[at] for at in cuts)
    # mergekit's breadcrumbs erase a tensor that is shorter than 1/density; ours do not, on purpose
    return density if clear and int(density * n) > 0 else 1.0


def _share_off_the_ties(variance: Tensor, share: float) -> float:
    ordered = variance.flatten().sort(descending=True).values
    kept, nonzero = int(share * int((ordered != 0).sum())), int((ordered != 0).sum())
    if kept == 0 or (nonzero < variance.numel() and kept == nonzero):
        return 1.0
    return share if kept == len(ordered) or ordered[kept - 1] > ordered[kept] * (1 + 1e-5) + 1e-12 else 1.0


def determined(case: Case) -> Tensor:
    """Where (bool) rounding cannot decide the result: off a sum of zero in an election, off a threshold in a fusion."""
    everywhere = torch.ones(case.models[0].shape, dtype=torch.bool)
    tolerance = 1e3 * EPSILON[case.models[0].dtype]
    if case.method == "arcee_fusion":
        first, second = (m.double() for m in case.models)
        scores = interpolation.importance(first.reshape(first.shape or (1,)), second.reshape(second.shape or (1,)))
        cut = interpolation.outlier_threshold(scores)
        # mergekit divides and takes logarithms in float32, where near vectors diverge by no more than the rounding
        return ((scores - cut).abs() > 1e-3 * cut.abs() + 1e-7).reshape(first.shape)
    if case.method == "multislerp":
        return everywhere & (_weighted_direction(case) > 1e-4)
    if case.method == "nuslerp":
        return _off_the_poles(case)
    if case.method not in ("ties", "breadcrumbs_ties", "sce"):
        return everywhere
    sums, sizes = _election(case)
    return (sums.abs() > tolerance * sizes) | (sizes == 0)


def _weighted_direction(case: Case) -> float:
    """The length of the weighted mean of directions: where it is 0 mergekit refuses, near 0 rounding turns it."""
    vectors = [(m if case.base is None else m - case.base).double().flatten() for m in case.models]
    weights = case.parameters["weight"]
    directions = [w * v / v.norm().clamp(min=1e-30) for w, v in zip(weights, vectors, strict=True)]
    return float(sum(directions).norm() / sum(abs(w) for w in weights))


def _off_the_poles(case: Case) -> Tensor:
    """Where vectors are not nearly opposite: there mergekit's float32 angle has lost its digits (ours is float64)."""
    parameters, shape = case.parameters, case.models[0].shape
    vectors = [(m if case.base is None else m - case.base).reshape(shape or (1,)) for m in case.models]
    each = not parameters["flatten"]
    products = common.rows_gram(vectors, 0 if parameters["row_wise"] else -1) if each else common.gram(vectors)
    cos = common.cosine(products, 0, 1)
    clear = (cos > -0.99) | (cos < -1 + 1e-12)
    return clear.expand(vectors[0].shape).reshape(shape)


def _election(case: Case) -> tuple[Tensor, Tensor]:
    base, models = case.base.double(), [m.double() for m in case.models]
    density = case.parameters.get("density", [1.0] * len(models))
    gamma = case.parameters.get("gamma", [0.0] * len(models))
    rows = zip(models, density, gamma, case.parameters["weight"], strict=True)
    weighted = [sparse.trim_both(m - base, p, g) * w for m, p, g, w in rows]
    return sum(weighted), sum(d.abs() for d in weighted)


@dataclasses.dataclass(frozen=True)
class Difference:
    """`units`: the largest difference over the scale's precision; `largest`: absolute; counts of elements."""

    largest: float
    units: float
    equal: int
    compared: int
    total: int


def compare(case: Case) -> Difference:
    """Our result against mergekit's, where it is determined."""
    ours, where = case.ours(), determined(case)
    theirs = case.theirs() if where.any() else ours
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    gap = (ours.double() - theirs.double()).abs()[where]
    largest = float(gap.max()) if gap.numel() else 0.0
    unit = EPSILON[ours.dtype] * max(magnitude(case), float(ours.abs().max()))
    return Difference(largest, largest / unit, int((gap == 0).sum()), gap.numel(), ours.numel())


def errors(case: Case) -> tuple[float, float]:
    """How far our result and mergekit's are from mergekit's own in float64, on the same inputs: the largest of each."""
    wide = dataclasses.replace(
        case, models=[m.double() for m in case.models], base=None if case.base is None else case.base.double()
    )
    where = determined(case)
    if not where.any():
        return 0.0, 0.0
    truth = wide.theirs()
    gaps = [(merged.double() - truth).abs()[where].max() for merged in (case.ours(), case.theirs())]
    return float(gaps[0]), float(gaps[1])


def allowed(case: Case) -> float:
    """The difference that rounding explains, in units of `Difference.units`."""
    dtype = case.models[0].dtype
    return UNITS * EPSILON[torch.float32] / EPSILON[dtype] if case.method in NARROW else UNITS


def magnitude(case: Case) -> float:
    """The largest number that enters the sums: what a rounding error is relative to."""
    tensors = [*case.models, *([] if case.base is None else [case.base])]
    largest = max(float(t.abs().max()) for t in tensors)
    weights = case.parameters.get("weight", [1.0])
    size = sum(abs(w) for w in weights) if isinstance(weights, list) else 1.0
    divisor = abs(sum(weights)) if case.parameters.get("normalize") else 1.0
    return max(1e-3, largest * max(1.0, size, size / divisor if divisor > 1e-8 else 1.0) * _condition(case))


def _condition(case: Case) -> float:
    """How much model_stock's ratio magnifies an error of its cosine: N / divisor^2."""
    if case.method != "model_stock":
        return 1.0
    vectors, n = [m - case.base for m in case.models], len(case.models)
    each = case.parameters["filter_wise"] and case.base.ndim
    ratio = interpolation.stock_ratio(common.rows_gram(vectors, -1) if each else common.gram(vectors))
    # t = N c / (1 + (N - 1) c) gives 1 / (1 + (N - 1) c) = 1 - t (N - 1) / N
    return float(n * (1 - ratio * (n - 1) / n).square().max().clamp(min=1.0))
