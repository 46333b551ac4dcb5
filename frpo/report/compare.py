"""Differences between methods with intervals: over seeds, on the measurements that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10, nan

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95
# A spread this small against rewards in [0, 1] is rounding, not variation.
ROUNDING = 1e-12
# Nats; a KL below it, or an estimate below 0, is no drift at all and has no logarithm worth telling apart.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a 95% interval; ``low`` and ``high`` are NaN with fewer than two seeds.

    ``p`` is the two-sided p-value of a mean of zero, for differences.
    """

    mean: float = nan
    low: float = nan
    high: float = nan
    seeds: int = 0
    p: float = nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low))


def estimate(values: ArrayLike) -> Estimate:
    """Student's t interval of the mean of one value per seed (Student 1908); values that are NaN do not count.

    Training is what varies most here, and a study has three to ten seeds: too few for a bootstrap over seeds, whose
    percentile interval covers far less than 95% of the time below about ten. Prompts are the same for all methods and
    seeds, so the interval speaks for other seeds on these prompts.
    """
    x = np.asarray(values, dtype=float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return Estimate(mean=float(x.mean()) if len(x) else nan, seeds=len(x))
    mean, error = float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
    if error < ROUNDING:
        return Estimate(mean, mean, mean, len(x), p=float(abs(mean) < ROUNDING))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1)) * error
    return Estimate(mean, mean - half, mean + half, len(x), float(2 * stats.t.sf(abs(mean) / error, len(x) - 1)))


def seed_means(table: pd.DataFrame, method: str) -> pd.Series:
    """The mean over a method's columns, by seed; a column that is not measured does not count."""
    if table.empty or method not in table.index.get_level_values("method"):
        return pd.Series(dtype=float)
    return table.xs(method, level="method").mean(axis=1).dropna()


def shared(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Means by seed, one column per method, over the columns of ``table`` that all of ``methods`` have at any seed.

    A seed where one of them lacks one of these columns is left out: its mean would be over easier or harder runs.
    """
    known = set(table.index.get_level_values("method")) if not table.empty else set[str]()
    if not known.issuperset(methods):
        return pd.DataFrame(columns=list(methods), dtype=float)
    own = [table.xs(name, level="method") for name in methods]
    seeds = [seed for seed in own[0].index if all(seed in other.index for other in own)]
    values = np.stack([part.loc[seeds].to_numpy(dtype=float) for part in own])
    has = np.isfinite(values).all(axis=0)
    needed = has.any(axis=0)
    whole = has[:, needed].all(axis=1) & needed.any()
    means = values[:, whole][:, :, needed].mean(axis=-1) if whole.any() else np.empty((len(own), 0))
    return pd.DataFrame(means.T, index=[s for s, kept in zip(seeds, whole, strict=True) if kept], columns=list(methods))


def paired(table: pd.DataFrame, method: str, other: str) -> pd.Series:
    """``method - other`` by seed, over what both have; seeds lacking some of it are left out, see :func:`shared`."""
    both = shared(table, list(dict.fromkeys((method, other))))
    return both[method] - both[other]


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The broken line through the points (xs, ys), ordered by x, at ``x``; NaN outside them or with fewer than two.

    Points at one x count as their mean.
    """
    points = np.array([xs, ys], dtype=float)
    points = points[:, np.isfinite(points).all(axis=0)]
    at, place = np.unique(points[0], return_inverse=True)
    if len(at) < 2 or not at[0] <= x <= at[-1]:
        return nan
    return float(np.interp(x, at, np.bincount(place, points[1]) / np.bincount(place)))


@dataclass(frozen=True)
class Matched:
    """A method against the baseline's sweep at an equal value of another quantity.

    ``differences`` by seed, for the seeds whose value lies inside the sweep's; ``outside`` counts the seeds where all
    is measured and it does not. ``points`` methods make the sweep's curve. ``method_range`` and ``sweep_range`` are the
    values of that quantity over all these seeds.
    """

    differences: pd.Series
    outside: int
    points: int
    method_range: tuple[float, float]
    sweep_range: tuple[float, float]


def matched(
    retained: pd.DataFrame, before: pd.Series, method: str, sweep: Sequence[str], *, log: bool = False
) -> Matched:
    """Retained value of ``method`` minus that of the sweep's curve at the method's own value of ``before``, by seed.

    Args:
        retained: rows (method, seed), columns (condition, step).
        before: the matched quantity by (method, seed).
        method: what is compared.
        sweep: methods of the baseline that differ in beta alone; those measured at all make each seed's curve of points
            (before, retained). Seeds that lack what others have are left out, see :func:`shared`.
        log: interpolate in the logarithm of ``before``, for a quantity that spans decades.
    """
    known = [{name for name, _ in values.index} for values in (retained, before)]
    members = [name for name in sweep if all(name in names for names in known)]
    levels = shared(retained, [method, *members])
    differences: dict[int, float] = {}
    own, others, outside = [inf, -inf], [inf, -inf], 0
    for seed, (level, *curve) in zip(levels.index, levels.to_numpy(), strict=True):
        x, *xs = (float(before.get((name, seed), nan)) for name in (method, *members))
        if not np.isfinite([x, *xs]).all() or not xs:
            continue
        own, others = [min(own[0], x), max(own[1], x)], [min(others[0], *xs), max(others[1], *xs)]
        at = [log10(max(v, SMALLEST)) for v in (x, *xs)] if log else [x, *xs]
        there = interpolate(at[0], at[1:], curve)
        if np.isfinite(there):
            differences[seed] = float(level) - there
        else:
            outside += 1
    series = pd.Series(differences, dtype=float)
    return Matched(series, outside, len(members), (own[0], own[1]), (others[0], others[1]))


def left_out_errors(
    retained: pd.DataFrame, before: pd.Series, sweep: Sequence[str], *, log: bool = False
) -> list[float]:
    """How far the curve without a method of the sweep misses that method, for each one within the others' range.

    The price of interpolating between few betas: a matched difference of this size may be the curve's own error.
    """
    found = [matched(retained, before, name, [o for o in sweep if o != name], log=log).differences for name in sweep]
    return [float(differences.mean()) for differences in found if len(differences)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): the family-wise error stays below the level; NaN does not count."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(p), nan)
    known = [int(i) for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    highest = 0.0
    for rank, i in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * float(p[i])))
        adjusted[i] = highest
    return [float(value) for value in adjusted]
