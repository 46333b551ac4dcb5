from __future__ import annotations

import numpy as np
import pytest

from frpo.evaluation.intervals import mean_interval

TRIALS = 200


def test_an_interval_over_prompts_covers_the_mean_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(TRIALS):
        prompts = rng.beta(2, 2, size=40)
        groups = [rng.random(3) < p for p in prompts]  # samples of one prompt are alike
        found = mean_interval([g.astype(float) for g in groups], resamples=400)
        hits += found.low <= 0.5 <= found.high
    assert 0.89 <= hits / TRIALS <= 0.99


def test_treating_samples_as_prompts_would_cover_too_little():
    """The same data without their grouping: the interval is too short, which the grouped one must not be."""
    rng = np.random.default_rng(0)
    groups = [np.full(8, value) for value in rng.normal(size=30)]
    grouped, flat = mean_interval(groups), mean_interval([[v] for group in groups for v in group])
    assert grouped.value == pytest.approx(flat.value)
    assert grouped.high - grouped.low > 2 * (flat.high - flat.low)


def test_prompts_with_more_samples_weigh_more():
    assert mean_interval([[1.0, 1.0, 1.0], [0.0]]).value == 0.75


def test_an_interval_is_the_same_every_time_and_refuses_no_data():
    values = np.random.default_rng(4).normal(size=(20, 2))
    assert mean_interval(list(values)) == mean_interval(list(values))
    assert mean_interval([[0.5, 0.7]]).low == mean_interval([[0.5, 0.7]]).high == pytest.approx(0.6)
    assert mean_interval([[1.0], [1.0]]).low == 1.0
    for bad in ([], [[1.0], []], [[np.nan]]):
        with pytest.raises(ValueError, match="mean_interval"):
            mean_interval(bad)
