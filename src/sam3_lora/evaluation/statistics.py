"""Numbers about yes-or-no answers, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BINS = 10
_TIMES = 1000
_PERCENTILES = (2.5, 97.5)


class Interval(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def calibration_error(confidence: Floats, truth: Bools) -> float:
    """Return the expected calibration error, 0 to 1, over ten bins of equal width (Guo et al., 2017).

    Args:
        confidence: ``(N,)`` probabilities that the answer is yes.
        truth: ``(N,)`` whether it is.
    """
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[bins == number].mean() - truth[bins == number].mean()) * (bins == number).mean()
        for number in np.unique(bins)
    ]
    return float(sum(gaps))


def matthews_correlation(answer: Bools, truth: Bools) -> float:
    """Return how well yes is told from no, -1 to 1; 0 where all answers or all truths are the same."""
    yes, no = answer.astype(float), truth.astype(float)
    if not yes.std() or not no.std():
        return 0.0
    return float(np.corrcoef(yes, no)[0, 1])


def bootstrap(
    groups: int, measure: Callable[[NDArray[np.intp]], float], seed: int, times: int = _TIMES
) -> Interval:
    """Return a measure of all groups, with the interval that drawing the groups again and again gives it.

    Args:
        groups: How many there are; what belongs together, such as the pairs of an image, is drawn together.
        measure: Takes the drawn groups as ``(groups,)`` indices, some of them more than once.
        seed: Of the draws.
        times: How often to draw.
    """
    rng = np.random.default_rng(seed)
    values = [measure(rng.integers(groups, size=groups)) for _ in range(times)]
    low, high = np.percentile(values, _PERCENTILES)
    return Interval(measure(np.arange(groups)), float(low), float(high))
