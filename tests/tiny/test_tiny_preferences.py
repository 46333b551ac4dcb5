"""Preference pairs of the tiny world: preferred by the graded reward, with the noise asked for."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from frpo.tiny.preferences import TinyPreferences, TinyValues, true_reward


def test_the_better_answer_is_preferred() -> None:
    examples = TinyPreferences(pairs=2).examples()
    gaps = [true_reward(e.prompt, e.responses[0]) - true_reward(e.prompt, e.responses[1]) for e in examples]
    assert len(examples) == 2 * 1296
    assert min(gaps) > 0
    assert Counter(e.prompt.task for e in examples).keys() == {"risky", "benign"}


def test_answers_are_of_every_worth() -> None:
    for task in ("risky", "benign"):
        values = {round(e.target, 3) for e in TinyValues().examples() if e.prompt.task == task}
        assert len(values) >= 6
        assert {0.0, 1.0} <= values


def test_the_noise_is_that_of_bradley_terry() -> None:
    temperature = 0.3
    examples = TinyPreferences(pairs=4, temperature=temperature).examples()
    gaps = [true_reward(e.prompt, e.responses[0]) - true_reward(e.prompt, e.responses[1]) for e in examples]
    wrong = sum(gap < 0 for gap in gaps) / len(gaps)
    expected = sum(1 / (1 + math.exp(abs(gap) / temperature)) for gap in gaps) / len(gaps)
    assert 0.1 < expected < 0.4
    assert wrong == pytest.approx(expected, abs=0.03)


def test_a_seed_is_a_set_of_pairs() -> None:
    assert TinyPreferences(seed=3).examples() == TinyPreferences(seed=3).examples()
    assert TinyPreferences(seed=3).examples() != TinyPreferences(seed=4).examples()
    assert len(TinyPreferences(limit=10, pairs=3).examples()) == 30
    assert len(TinyValues(limit=10).examples()) == 10


@pytest.mark.parametrize(("settings", "message"), [({"pairs": 0}, "pairs: got 0"), ({"temperature": 0.0}, "got 0.0")])
def test_bad_settings_are_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TinyPreferences(**settings)
