"""What every registered merge method promises, as functions of a `Method`: a new method inherits all of them.

`CHECKS` lists them; each raises AssertionError where the promise is broken.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mergesearch.errors import UserError
from mergesearch.methods import Method, Parameter, mask_key

SHAPES = [(), (1,), (7,), (5, 6), (1, 4), (4, 1), (3, 4, 5)]


def count(method: Method) -> int:
    """A number of models that the method takes, three where it can."""
    return max(method.min_models, min(3, method.max_models or 3))


def labels(method: Method) -> list[str]:
    return [f"m{i}" for i in range(count(method))]


def inputs(method: Method, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random base and models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    deltas = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in labels(method)]
    return base.to(dtype), [(base + 0.3 * d).to(dtype) for d in deltas]


def merge(method: Method, base: Tensor | None, models: list[Tensor], given: dict[str, Any] | None = None) -> Tensor:
    """One merge with the models called m0, m1, ... and the masks of seed 0."""
    parameters = method.complete(given or {}, labels(method), "the test", has_base=base is not None)
    return method(base, models, parameters, [mask_key(0, name, "w") for name in labels(method)])


def bases(method: Method, base: Tensor) -> list[Tensor | None]:
    """What may be given as a base: without one, too, where the method can do without."""
    return [base] if method.base == "required" else [base, None]


def settings(method: Method) -> Iterator[dict[str, Any]]:
    """The defaults, then each parameter at both ends of its search range, each choice, both of true and false."""
    yield {}
    for key, parameter in method.parameters.items():
        for value in ends(parameter):
            yield {key: value}


def ends(parameter: Parameter) -> tuple[Any, ...]:
    if parameter.kind == "bool":
        return (True, False)
    return parameter.choices or parameter.search or (parameter.default,)


def outside(parameter: Parameter) -> list[Any]:
    """Values that must be refused."""
    wrong: list[Any] = [None, "much", math.nan, math.inf]
    if parameter.kind in ("bool", "choice"):
        return [*wrong, 1, 0.5]
    if parameter.low is not None:
        wrong += [parameter.low - 1] + ([parameter.low] if parameter.low_open else [])
    if parameter.high is not None:
        wrong += [parameter.high + 1] + ([parameter.high] if parameter.high_open else [])
    return [*wrong, True] + ([1.5] if parameter.kind == "int" else [])


def ordered(method: Method) -> bool:
    """Whether the first and second model play different parts."""
    return method.max_models == 2 and not any(p.per_model for p in method.parameters.values())


def check_keeps_shape_and_dtype(method: Method) -> None:
    for shape, dtype in itertools.product([*SHAPES, (0, 3)], (torch.float32, torch.float64)):
        base, models = inputs(method, shape, dtype)
        for either in bases(method, base):
            merged = merge(method, either, models)
            assert (tuple(merged.shape), merged.dtype) == (shape, dtype)


def check_finite(method: Method) -> None:
    for shape, given in itertools.product(SHAPES, settings(method)):
        base, models = inputs(method, shape)
        assert merge(method, base, models, given).isfinite().all(), (shape, given)


def check_finite_on_degenerate_inputs(method: Method) -> None:
    for shape, given in itertools.product(SHAPES, settings(method)):
        base, models = inputs(method, shape)
        opposite = [base + (-1) ** i * (models[0] - base) for i in range(len(models))]
        mixed = [base, *models[1:]]
        for start, others in ((base * 0, [base * 0] * len(models)), (base, opposite), (base * 0, mixed), (base, mixed)):
            for either in bases(method, start):
                assert merge(method, either, others, given).isfinite().all(), (shape, given)


def check_leaves_inputs_alone(method: Method) -> None:
    for shape, given in itertools.product([(), (5, 6)], settings(method)):
        base, models = inputs(method, shape)
        before = [t.clone() for t in (base, *models)]
        merged = merge(method, base, models, given)
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *models), strict=True))
        merged.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *models), strict=True)), "the result is an input"


def check_no_global_randomness(method: Method) -> None:
    base, models = inputs(method, (5, 6))
    given = {"density": 0.5} if "density" in method.parameters else {}
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(merge(method, base, models, given))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*results)


def check_fixed_point(method: Method) -> None:
    for shape, given in itertools.product(SHAPES, settings(method)):
        if "normalize" in given or "scale" in given or "weight" in given:
            continue
        base, _ = inputs(method, shape)
        for either in bases(method, base):
            merged = merge(method, either, [base.clone() for _ in labels(method)], given)
            torch.testing.assert_close(merged, base, rtol=1e-5, atol=1e-6)


def check_order_of_models(method: Method) -> None:
    if ordered(method):
        return
    base, models = inputs(method, (5, 6), torch.float64)
    given = {k: [0.3 + 0.2 * i for i in range(len(models))] for k, p in method.parameters.items() if p.per_model}
    parameters = method.complete(given, labels(method), "the test")
    keys = [mask_key(0, name, "w") for name in labels(method)]
    merged = method(base, models, parameters, keys)
    turned = {k: v[::-1] if method.parameters[k].per_model else v for k, v in parameters.items()}
    torch.testing.assert_close(method(base, models[::-1], turned, keys[::-1]), merged, rtol=1e-12, atol=1e-12)


def check_defaults(method: Method) -> None:
    for key, parameter in method.parameters.items():
        assert parameter.key == key
        assert parameter.check(parameter.default, "the test") == parameter.default
        assert all(parameter.check(v, "the test") == v for v in ends(parameter))
        assert parameter.meaning, f"{key} has no meaning"


def check_refuses_out_of_range(method: Method) -> None:
    for key, parameter in method.parameters.items():
        for value in outside(parameter):
            with pytest.raises(UserError, match=re.escape(repr(value))) as caught:
                method.complete({key: value}, labels(method), "rules[0]")
            assert parameter.allowed in str(caught.value) and "rules[0]" in str(caught.value)


def check_refuses_unknown_parameter(method: Method) -> None:
    with pytest.raises(UserError, match=r"wieght.*rules\[0\]"):
        method.complete({"wieght": 1.0}, labels(method), "rules[0]")


def check_refuses_wrong_number_of_models(method: Method) -> None:
    wrong = [method.min_models - 1] + ([method.max_models + 1] if method.max_models else [])
    for number in wrong:
        with pytest.raises(UserError, match=f"not {number}"):
            method.complete({}, [f"m{i}" for i in range(number)], "rules[0]")


def check_refuses_missing_base(method: Method) -> None:
    if method.base != "required":
        return
    _, models = inputs(method, (3,))
    with pytest.raises(UserError, match="base"):
        method.complete({}, labels(method), "rules[0]", has_base=False)
    with pytest.raises(UserError, match="base"):
        method(None, models, method.complete({}, labels(method), "rules[0]"))


def check_per_model_forms(method: Method) -> None:
    names = labels(method)
    for key, parameter in method.parameters.items():
        if not parameter.per_model:
            continue
        low, high = parameter.search or (parameter.default, parameter.default)
        values = [low + (high - low) * (i + 1) / (len(names) + 1) for i in range(len(names))]
        by_name = dict(zip(names, values, strict=True))
        assert method.complete({key: values}, names, "the test")[key] == values
        assert method.complete({key: by_name}, names, "the test")[key] == values
        assert method.complete({key: {}}, names, "the test")[key] == [parameter.default] * len(names)
        assert method.complete({key: high}, names, "the test")[key] == [high] * len(names)
        for wrong in ([high] * (len(names) + 1), {"nobody": high}):
            with pytest.raises(UserError, match=key):
                method.complete({key: wrong}, names, "rules[0]")


def check_non_contiguous(method: Method) -> None:
    base, models = inputs(method, (5, 6))
    strided = [t.t().contiguous().t() for t in models]
    assert not strided[0].is_contiguous()
    for given in settings(method):
        merged = merge(method, base, models, given)
        assert torch.equal(merge(method, base.t().contiguous().t(), strided, given), merged), given


def check_scalars_as_tensors(method: Method) -> None:
    base, models = inputs(method, (5, 6))
    given = {k: p.search[0] + 0.37 * (p.search[1] - p.search[0]) for k, p in method.parameters.items() if p.search}
    parameters = method.complete(given, labels(method), "the test")
    keys = [mask_key(0, name, "w") for name in labels(method)]
    wrapped = {k: _wrap(v) if method.parameters[k].kind == "float" else v for k, v in parameters.items()}
    assert torch.equal(method(base, models, wrapped, keys), method(base, models, parameters, keys))


def _wrap(value: Any) -> Any:
    if isinstance(value, list):
        return [_wrap(v) for v in value]
    return torch.tensor(value, dtype=torch.float64)


def check_large_density_is_everything(method: Method) -> None:
    """density 1 leaves task vectors as they are: what makes sparse changes nothing."""
    if "density" not in method.parameters:
        return
    base, models = inputs(method, (5, 6))
    same = merge(method, base, [models[0]] * len(models), {"density": 1.0, "normalize": True})
    torch.testing.assert_close(same, models[0], rtol=1e-5, atol=1e-6)


def check_documented(method: Method) -> None:
    text = inspect.getdoc(method.function) or ""
    assert method.summary.endswith(".") and method.paper
    assert "shape" in text
    for identifier in re.findall(r"arXiv:[\d.]+\d", method.paper):
        assert identifier in text, f"{identifier} is not in the docstring"
    for key in method.parameters:
        assert re.search(rf"\b{key}:\s", text), f"{key} is not in the docstring"


CHECKS: dict[str, Callable[[Method], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}
