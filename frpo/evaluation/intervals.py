"""Values with 95% intervals, and the bootstrap over prompts.

Percentile intervals: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13. They cover a little less
than they say below some 20 prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 5000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(groups: Sequence[Array | Sequence[float]], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean over all values of prompts, each a group of one or more samples; prompts are drawn, whole.

    ``groups[p]`` holds the values of prompt p, [n_p]. A single prompt gives a point, its own mean.
    Raises ``ValueError`` where there is no prompt, an empty one, or a value that is not finite.
    """
    values = [np.asarray(group, dtype=np.float64).ravel() for group in groups]
    if not values or not all(len(group) for group in values):
        raise ValueError("mean_interval: got a prompt without values or no prompt at all; leave such prompts out")
    totals = np.array([group.sum() for group in values])
    counts = np.array([len(group) for group in values], dtype=np.float64)
    if not np.isfinite(totals).all():
        raise ValueError("mean_interval: got a value that is not finite; leave completions without a value out")
    mean = float(totals.sum() / counts.sum())
    if len(values) == 1:
        return Interval(mean, mean, mean)

    def ratio(total: Array, count: Array, axis: int = -1) -> Array:
        mean: Array = total.sum(axis) / count.sum(axis)
        return mean

    found = stats.bootstrap(
        (totals, counts),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 10**6 // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
