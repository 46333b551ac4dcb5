"""KL estimators: values, what they estimate, what their gradients estimate, and their ranges."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.kl import full_kl, k1, k2, k3

PAIRS = [(k1, oracles.k1), (k2, oracles.k2), (k3, oracles.k3)]
each = pytest.mark.parametrize(("function", "oracle"), PAIRS, ids=["k1", "k2", "k3"])


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each
@settings(max_examples=50, deadline=None)
@given(logp=st.floats(-10, 0), ref=st.floats(-10, 0))
def test_values(function, oracle, logp, ref):
    got = function(torch.tensor([[logp]], dtype=torch.float64), torch.tensor([[ref]], dtype=torch.float64))
    assert got.shape == (1, 1)
    assert got.item() == pytest.approx(oracle(logp, ref), rel=1e-9, abs=1e-9)


@each
def test_gradients(function, oracle):
    logps = (-random_logits(0, 6).abs()).requires_grad_()
    ref = -random_logits(1, 6).abs()
    (gradient,) = torch.autograd.grad(function(logps, ref).sum(), logps)
    for i in range(6):
        expected = oracles.finite_difference(lambda x, i=i: oracle(x[0], ref[i].item()), [logps[i].item()])
        assert gradient[i].item() == pytest.approx(expected[0], abs=1e-9)
    assert torch.autograd.gradcheck(lambda x: function(x, ref), logps)
    if function is not k1:
        assert torch.autograd.gradgradcheck(lambda x: function(x, ref), logps)


def test_k1_and_k3_are_unbiased_for_the_kl():
    policy, reference = random_logits(2, 7).log_softmax(-1), random_logits(3, 7).log_softmax(-1)
    exact = oracles.full_kl(policy.tolist(), reference.tolist())
    for function in (k1, k3):
        assert (policy.exp() * function(policy, reference)).sum().item() == pytest.approx(exact, abs=1e-12)


def test_the_gradient_of_k2_is_unbiased_for_the_gradient_of_the_kl():
    logits, reference = random_logits(4, 7).requires_grad_(), random_logits(5, 7).log_softmax(-1)
    (exact,) = torch.autograd.grad(full_kl(logits, reference), logits)
    policy = logits.log_softmax(-1)
    sampled = (policy.detach().exp() * k2(policy, reference)).sum()
    (expected_gradient,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(expected_gradient, exact, rtol=0, atol=1e-12)


def test_equal_policies_have_no_kl_and_no_gradient_but_for_k1():
    logps = (-random_logits(6, 4).abs()).requires_grad_()
    for function, expected in ((k1, 1.0), (k2, 0.0), (k3, 0.0)):
        value = function(logps, logps.detach().clone())
        assert value.tolist() == [0.0] * 4
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        assert gradient.tolist() == pytest.approx([expected] * 4, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_k2_k3_and_full_are_never_negative(seed):
    a, b = random_logits(seed, 3, 5), random_logits(seed + 1, 3, 5)
    assert (k2(a, b) >= 0).all()
    assert (k3(a, b) >= 0).all()
    assert (full_kl(a, b) >= -1e-12).all()


@pytest.mark.parametrize("function", [k1, k2, k3])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_gaps_do_not_overflow_in_float32(function, gap):
    logps = torch.tensor([-1.0], requires_grad=True)
    value = function(logps, logps.detach() + gap)
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert gradient.isfinite().all()


def test_full_kl_agrees_with_loops():
    logits, reference = random_logits(7, 2, 3, 9), random_logits(8, 2, 3, 9) * 3
    got = full_kl(logits, reference)
    assert got.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            expected = oracles.full_kl(logits[i, j].tolist(), reference[i, j].tolist())
            assert got[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_full_kl_gradient_agrees_with_loops():
    logits, reference = random_logits(9, 5).requires_grad_(), random_logits(10, 5)
    (gradient,) = torch.autograd.grad(full_kl(logits, reference), logits)
    expected = oracles.finite_difference(lambda x: oracles.full_kl(x, reference.tolist()), logits.tolist())
    assert gradient.tolist() == pytest.approx(expected, abs=1e-10)
    assert torch.autograd.gradcheck(lambda x: full_kl(x, reference), logits)
    assert torch.autograd.gradgradcheck(lambda x: full_kl(x, reference), logits)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50))
def test_full_kl_ignores_constants_of_the_logits(shift):
    logits, reference = random_logits(11, 6), random_logits(12, 6)
    torch.testing.assert_close(
        full_kl(logits + shift, reference - shift), full_kl(logits, reference), rtol=0, atol=1e-11
    )


def test_full_kl_of_a_certain_policy_is_finite():
    logits = torch.tensor([500.0, 0.0, -500.0], requires_grad=True)
    reference = torch.tensor([0.0, 0.0, 0.0])
    value = full_kl(logits, reference)
    assert value.item() == pytest.approx(1.0986123, abs=1e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()


def test_full_kl_of_truncated_policies():
    """Tokens that both cut add nothing; one that only the reference cut costs everything."""
    logits = torch.tensor([0.2, -torch.inf, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, -torch.inf, 0.1], dtype=torch.float64)
    value = full_kl(logits, reference)
    assert value.item() == pytest.approx(oracles.full_kl([0.2, 1.0], [0.5, 0.1]), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    assert gradient[1] == 0
    assert full_kl(reference, torch.tensor([0.5, 0.3, -torch.inf], dtype=torch.float64)).item() == float("inf")


def test_mismatched_shapes_are_refused():
    for function in (k1, k2, k3, full_kl):
        with pytest.raises((ValueError, AssertionError), match=r"ref"):
            function(torch.zeros(2, 3), torch.zeros(2, 4))
