"""Methods on the models themselves: averages and paths between them, with no need of a base.

All tensors of one call have one shape, dtype (float32 or float64) and device; scalars may be 0-d float64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from mergesearch.methods.common import Normalize, Scalar, Weights, nonzero, per_model, scalar, total, weighted_sum
from mergesearch.methods.registry import Parameter, method

PATH = (0.0, 1.0)
Path = Annotated[
    Scalar,
    Parameter(low=0.0, high=1.0, search=PATH, meaning="how far to go: 0 is the first model, 1 the second"),
]


@method(paper="Wortsman et al. 2022, arXiv:2203.05482", family="interpolation", base="unused")
def linear(
    base: Tensor | None, models: Sequence[Tensor], *, weight: Weights = 1.0, normalize: Normalize = True
) -> Tensor:
    """Average the models, weighted.

    sum_i w_i x_i, divided by sum_i w_i if `normalize` (a sum below 1e-8 counts as 1). Wortsman et al., "Model soups",
    arXiv:2203.05482.

    weight: any number for each model, 1. normalize: true. Each model: one shape; returns that shape.
    """
    weights = per_model(weight, models)
    merged = weighted_sum(models, weights)
    return merged / nonzero(total(weights), 1e-8) if normalize else merged


@method(paper="Wortsman et al. 2022, arXiv:2203.05482", family="interpolation", base="unused")
def uniform_soup(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Average the models with equal weights: `linear` with nothing to choose.

    (1/N) sum_i x_i. Wortsman et al., "Model soups", arXiv:2203.05482, the uniform soup. Each model: one shape; returns
    that shape.
    """
    return linear(base, models)


@method(
    paper="Shoemake 1985, SIGGRAPH 19(3), 245-254", family="interpolation", base="unused", min_models=2, max_models=2
)
def slerp(base: Tensor | None, models: Sequence[Tensor], *, t: Path = 0.5) -> Tensor:
    """Go from the first model to the second along the great circle between their directions.

    sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, theta the angle between a and b as flat vectors; the line
    (1-t) a + t b where |cos theta| > 0.9995 or one of them is zero. Shoemake, "Animating rotation with quaternion
    curves", 1985.

    t: [0, 1], 0.5. Two models of one shape; returns that shape.
    """
    first, second = models
    left, right = slerp_coefficients(cosine(first, second), scalar(t))
    return first * left + second * right


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between two tensors as flat vectors, 0-d float64; 1 where one of them is zero."""
    dot, norms = (a * b).sum().double(), a.norm().double() * b.norm().double()
    return torch.where(norms > 0, dot / norms, torch.ones_like(norms)).clamp(-1.0, 1.0)


def slerp_coefficients(cos: Tensor, t: Tensor, straight: float = 0.9995) -> tuple[Tensor, Tensor]:
    """What the two ends are multiplied by; those of the line where |cos| > `straight`. Shapes broadcast."""
    line = cos.abs() > straight
    theta = torch.acos(torch.where(line, torch.zeros_like(cos), cos))
    left, right = torch.sin((1 - t) * theta) / torch.sin(theta), torch.sin(t * theta) / torch.sin(theta)
    return torch.where(line, 1 - t, left), torch.where(line, t, right)
