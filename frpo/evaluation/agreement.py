"""How far scores agree with labels that people gave: point estimates, and bootstrap intervals over groups of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from frpo.evaluation.intervals import Interval

METRICS = ("accuracy", "balanced_accuracy", "kappa", "auroc")


def agreement(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    threshold: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Agreement of ``scores`` (higher means 1) with ``labels`` of 0 and 1, by metric, each of shape [N].

    A row counts as 1 where its score is at least ``threshold``. Intervals are percentiles of a bootstrap that draws
    whole ``groups`` of rows; resamples in which a metric is undefined are left out of it.

    - ``accuracy``: share of rows decided as labelled;
    - ``balanced_accuracy``: the mean of that share over the two labels;
    - ``kappa``: (accuracy - chance) / (1 - chance), Cohen 1960, 0 for chance and 1 for agreement throughout;
    - ``auroc``: probability that a row of label 1 scores higher than one of label 0, ties counting half.

    Raises:
        ValueError: the labels are not both 0 and 1.
    """
    if set(np.unique(labels)) != {0, 1}:
        raise ValueError(f"labels: got {sorted(set(labels.tolist()))[:4]}, expected 0 and 1, and some of both")
    counts = np.random.default_rng(seed).multinomial(
        groups.max() + 1, np.full(groups.max() + 1, 1 / (groups.max() + 1)), size=resamples
    )
    estimates = _metrics(scores, labels, threshold, np.ones((1, len(labels))))
    drawn = _metrics(scores, labels, threshold, counts[:, groups].astype(float))
    intervals = {name: np.nanquantile(drawn[name], (0.025, 0.975)) for name in METRICS}
    return {name: Interval(float(estimates[name][0]), *map(float, intervals[name])) for name in METRICS}


def _metrics(scores: np.ndarray, labels: np.ndarray, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric [R] under ``R`` weightings of the rows, ``weights`` [R, N]; NaN where it is undefined.

    scikit-learn has the same metrics for one weighting at a time, some twenty times slower over a bootstrap.
    """
    said, is_one = scores >= threshold, labels == 1
    ones, zeros = weights[:, is_one], weights[:, ~is_one]
    n_one, n_zero = ones.sum(1), zeros.sum(1)
    hits, rejections = ones @ said[is_one], zeros @ ~said[~is_one]
    total, said_one = n_one + n_zero, weights @ said
    wins = scores[is_one][:, None] - scores[~is_one][None, :]
    wins = (1 + np.sign(wins)) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = (hits + rejections) / total
        chance = (n_one * said_one + n_zero * (total - said_one)) / total**2
        return {
            "accuracy": accuracy,
            "balanced_accuracy": (hits / n_one + rejections / n_zero) / 2,
            "kappa": (accuracy - chance) / (1 - chance),
            "auroc": ((ones @ wins) * zeros).sum(1) / (n_one * n_zero),
        }


def linked_groups(*keys: Sequence[str]) -> np.ndarray:
    """Number rows [N] so that rows that share any key share a number: copies must not stand on both sides of a split.

    Each of ``keys`` holds one string per row: the prompts, say, or the responses.
    """
    rows = len(keys[0])
    left, right = [], []
    for column in keys:
        first: dict[str, int] = {}
        for row, key in enumerate(column):
            left.append(row)
            right.append(first.setdefault(key, row))
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(rows, rows))
    groups: np.ndarray = connected_components(graph, directed=False)[1]
    return groups
