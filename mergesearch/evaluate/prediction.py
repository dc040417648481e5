"""What a mean over all documents will be, predicted from those seen so far and from what is known of the rest; numpy.

Of a finite population of N documents n were seen. Where other candidates' values are known on all N, a regression on
them says more about the rest than the mean of the seen does: the model-assisted regression estimator of survey sampling

    mean of y over all = mean of y over the seen + w . (mean of x over all - mean of x over the seen)

(Cochran, Sampling Techniques, 3rd ed. 1977, chapter 7; Saerndal, Swensson and Wretman, Model Assisted Survey Sampling,
1992, chapter 6), with w by ridge regression and its penalty by leave-one-out error, against no regression at all. Its
variance is that of the leave-one-out residuals: these do not shrink with the number of regressors, as plain ones do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Penalties, as shares of the regressors' mean sum of squares.
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
# A leverage of 1 leaves nothing to be left out.
MOST_LEVERAGE = 0.95
NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the regression adds.

    Attributes:
        shift: to the mean over the seen documents.
        residuals: [n], each seen document's, predicted by all others.
        freedom: degrees of freedom that are left, at least 1.
    """

    shift: float
    residuals: np.ndarray
    freedom: float


def predict(y: np.ndarray, seen: np.ndarray, mean: np.ndarray) -> Prediction:
    """The best of no regression and of ridge regressions with an intercept.

    Args:
        y: [n], n >= 2, of the seen documents.
        seen: [n, p], the regressors on them.
        mean: [p], the regressors' means over all documents.
    """
    n = len(y)
    centred = y - y.mean()
    best = Prediction(0.0, centred * (n / (n - 1)), n - 1.0)
    around = seen - seen.mean(axis=0)
    scale = float((around**2).sum() / max(1, seen.shape[1]))
    if scale <= NOTHING:
        return best
    left, singular, right = np.linalg.svd(around, full_matrices=False)
    inside, squares = left.T @ centred, singular**2
    for penalty in PENALTIES:
        kept = squares / (squares + penalty * scale)
        leverage = np.minimum(1 / n + left**2 @ kept, MOST_LEVERAGE)
        residuals = (centred - left @ (kept * inside)) / (1 - leverage)
        if (residuals**2).sum() < (best.residuals**2).sum():
            weights = right.T @ (singular / (squares + penalty * scale) * inside)
            shift = float(weights @ (mean - seen.mean(axis=0)))
            best = Prediction(shift, residuals, max(1.0, n - 1.0 - float(kept.sum())))
    return best
