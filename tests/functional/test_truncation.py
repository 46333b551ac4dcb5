"""Top-k and nucleus."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.truncation import truncate

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def kept(logits: torch.Tensor) -> list[bool]:
    return (logits > -torch.inf).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (None, 1.0, [True, True, True, True]),
        (2, 1.0, [True, True, False, False]),
        (1, 1.0, [True, False, False, False]),
        (9, 1.0, [True, True, True, True]),
        (None, 0.35, [True, False, False, False]),
        (None, 0.65, [True, True, False, False]),
        (None, 0.75, [True, True, True, False]),
        (None, 0.95, [True, True, True, True]),
        (None, 1e-6, [True, False, False, False]),
        (2, 0.5, [True, False, False, False]),  # after top-k the first holds 4/7 > 0.5
        (3, 0.5, [True, True, False, False]),  # after top-k the first holds 4/9 < 0.5
    ],
)
def test_what_stays(top_k, top_p, expected):
    order = torch.tensor([2, 0, 3, 1])
    got = truncate(LOGITS[order], top_k=top_k, top_p=top_p)
    assert kept(got) == [expected[i] for i in order]
    stays = torch.tensor(kept(got))
    assert (got[stays] == LOGITS[order][stays]).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), top_p=st.floats(0.01, 0.99), top_k=st.one_of(st.none(), st.integers(1, 9)))
def test_the_nucleus_reaches_its_mass_and_is_the_smallest_that_does(seed, top_p, top_k):
    logits = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    candidates = truncate(logits, top_k=top_k)
    got = truncate(logits, top_k=top_k, top_p=top_p)
    probabilities = candidates.softmax(-1)
    for i in range(2):
        for j in range(3):
            stays = torch.tensor(kept(got[i, j]))
            assert stays.sum() <= candidates[i, j].isfinite().sum() <= (top_k or 8)
            mass = probabilities[i, j][stays]
            assert mass.sum() >= top_p - 1e-9
            assert (mass.sum() - mass.min()).item() < top_p + 1e-9
            if (~stays).any():
                assert probabilities[i, j][~stays].max() <= mass.min()


def test_a_mass_met_exactly_is_enough():
    """Of four equal tokens two hold half of the mass to the bit: a third one must not stay."""
    assert sum(kept(truncate(torch.zeros(4), top_p=0.5))) == 2


def test_the_drawn_token_always_stays():
    logits = LOGITS.expand(4, 4)
    got = truncate(logits, top_k=1, top_p=0.3, keep=torch.arange(4))
    for i in range(4):
        assert kept(got[i]) == [v in (0, i) for v in range(4)]


def test_which_tokens_are_cut_is_a_constant_of_the_gradient():
    logits = LOGITS.clone().requires_grad_()
    got = truncate(logits, top_p=0.65)
    (gradient,) = torch.autograd.grad(got[torch.tensor(kept(got))].sum(), logits)
    assert gradient.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert math.isinf(got[3].item())
