"""The estimators of the log of a mean: values, log space, masks, and their bias, enumerated exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.estimators import Jackknife, Naive

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [4, 8, 16, 32, 64]
ESTIMATORS = [Naive(), Jackknife(max_weight=None)]
both = pytest.mark.parametrize("estimator", ESTIMATORS, ids=["naive", "jackknife"])
log_weights = st.lists(st.floats(-8, 8), min_size=2, max_size=7)


def oracle(estimator, log_u: list[float]) -> float:
    return oracles.exact_log_mean(log_u, jackknife=isinstance(estimator, Jackknife))


@both
@settings(max_examples=40, deadline=None)
@given(log_u=log_weights)
def test_values_and_gradients_agree_with_the_oracle(estimator, log_u):
    x = torch.tensor(log_u, dtype=torch.float64, requires_grad=True)
    value = estimator.log_mean(x)
    assert value.shape == ()
    assert value.item() == pytest.approx(oracle(estimator, log_u), abs=1e-9)
    (gradient,) = torch.autograd.grad(value, x)
    plain = oracles.jackknife_log_mean if isinstance(estimator, Jackknife) else oracles.naive_log_mean
    expected = oracles.finite_difference(lambda v: plain([math.exp(y) for y in v]), log_u)
    assert gradient.tolist() == pytest.approx(expected, abs=1e-7)


@both
def test_leading_axes_are_batches(estimator):
    log_u = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = estimator.log_mean(log_u)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert value[i, j].item() == pytest.approx(oracle(estimator, log_u[i, j].tolist()), abs=1e-10)


@both
@settings(max_examples=30, deadline=None)
@given(log_u=log_weights, shift=st.floats(-1000, 1000))
def test_a_factor_comes_out_of_the_logarithm(estimator, log_u, shift):
    x = torch.tensor(log_u, dtype=torch.float64)
    torch.testing.assert_close(estimator.log_mean(x + shift), estimator.log_mean(x) + shift, rtol=0.0, atol=1e-9)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, 0.0])
def test_masked_places_are_inert(estimator, bad):
    log_u = torch.tensor([[0.3, bad, -1.0, 2.0], [1.0, 0.0, bad, bad]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    log_u.requires_grad_()
    value = estimator.log_mean(log_u, mask)
    expected = [oracle(estimator, [0.3, -1.0, 2.0]), oracle(estimator, [1.0, 0.0])]
    assert value.tolist() == pytest.approx(expected, abs=1e-10)
    (gradient,) = torch.autograd.grad(value.sum(), log_u)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.ones(2, dtype=torch.float64), **TIGHT)


@both
def test_first_and_second_derivatives_check(estimator):
    log_u = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_u.requires_grad_()
    assert torch.autograd.gradcheck(estimator.log_mean, log_u)
    assert torch.autograd.gradgradcheck(estimator.log_mean, log_u)


@both
@pytest.mark.parametrize(
    "log_u",
    [
        [1e4, 0.0, -1e4, 5e3],
        [1e4, 1e4, 0.0, 0.0],
        [-1e4, -1e4 + 1, -1e4 - 2, -1e4],
        [1e4, 0.0],
        [0.0, -1e4, -1e4, -1e4, -1e4, -1e4, -1e4, -1e4],
    ],
)
def test_log_space_holds_at_ten_thousand(estimator, log_u):
    for dtype, tolerance in [(torch.float64, 1e-9), (torch.float32, 1e-6)]:
        x = torch.tensor(log_u, dtype=dtype, requires_grad=True)
        value = estimator.log_mean(x)
        assert value.item() == pytest.approx(oracle(estimator, log_u), rel=tolerance)
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.isfinite().all()
        assert gradient.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_constant_weights_have_no_bias_to_correct():
    log_u = torch.full((5,), 0.7, dtype=torch.float64)
    for estimator in ESTIMATORS:
        assert estimator.log_mean(log_u).item() == pytest.approx(0.7, abs=1e-12)


def test_jackknife_needs_two():
    with pytest.raises(ValueError, match=r"at least 2, got 1"):
        Jackknife(max_weight=None).log_mean(torch.zeros(3, 1))
    mask = torch.tensor([[True, True, True], [False, True, False]])
    with pytest.raises(ValueError, match=r"at least 2, got 1"):
        Jackknife(max_weight=None).log_mean(torch.zeros(2, 3), mask)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_max_weight_must_be_positive(value):
    with pytest.raises(ValueError, match=rf"(?s)max_weight.*{value}"):
        Jackknife(max_weight=value)


# --- Bias, enumerated: rewards from a few values, every multiset of a group with its probability


def exact_bias(estimator, values: Sequence[float], probabilities: Sequence[float], lam: float, G: int) -> float:
    """E[log_mean] - log E[exp(-r/lam)] over groups of G independent rewards."""
    counts = list(oracles.compositions(G, len(values)))
    log_u = -torch.tensor(values, dtype=torch.float64) / lam
    groups = torch.stack([log_u.repeat_interleave(torch.tensor(c)) for c in counts])
    chances = torch.tensor([oracles.multinomial(c, probabilities) for c in counts], dtype=torch.float64)
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-10)
    truth = math.log(sum(p * math.exp(-v / lam) for v, p in zip(values, probabilities, strict=True)))
    return (chances @ estimator.log_mean(groups)).item() - truth


DISTRIBUTIONS = [
    pytest.param([0.0, 1.0], [0.4, 0.6], SIZES, id="two-point"),
    pytest.param([0.0, 0.3, 1.0], [0.2, 0.5, 0.3], SIZES[:4], id="three-point"),
]


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("values", "probabilities", "sizes"), DISTRIBUTIONS)
def test_naive_bias_falls_as_one_over_the_group(values, probabilities, sizes, lam):
    bias = [exact_bias(Naive(), values, probabilities, lam, G) for G in sizes]
    assert all(b < 0 for b in bias), "Jensen: the log of a mean is underestimated"
    assert oracles.slope(sizes, [-b for b in bias]) == pytest.approx(-1.0, abs=0.15)
    u = [math.exp(-v / lam) for v in values]
    mean = sum(p * x for p, x in zip(probabilities, u, strict=True))
    variance = sum(p * (x - mean) ** 2 for p, x in zip(probabilities, u, strict=True))
    assert bias[-1] * sizes[-1] == pytest.approx(-variance / (2 * mean**2), rel=0.05)


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("values", "probabilities", "sizes"), DISTRIBUTIONS)
def test_jackknife_bias_falls_as_one_over_the_group_squared(values, probabilities, sizes, lam):
    jackknife = [abs(exact_bias(Jackknife(max_weight=None), values, probabilities, lam, G)) for G in sizes]
    naive = [abs(exact_bias(Naive(), values, probabilities, lam, G)) for G in sizes]
    assert oracles.slope(sizes, jackknife) == pytest.approx(-2.0, abs=0.3)
    assert all(j < n / 4 for j, n in zip(jackknife, naive, strict=True))


def test_where_the_bias_orders_stop_holding():
    """A rare worst reward and a small lambda: the bias is the chance of a group without it, not a power of G.

    Reward 0 with chance p, else 1; lambda 0.05, so that one zero outweighs everything (exp(20) = 5e8). A group without
    a zero, of chance (1-p)^G, is off by about 20 nats whatever the estimator. At p = 0.1 that swamps 1/G up to G = 16:
    the naive bias is over ten times its leading term, and the jackknife's changes sign and grows from G = 8 to 16.
    """
    values, chances, lam = [0.0, 1.0], [0.1, 0.9], 0.05
    for G in (4, 8, 16):
        naive = exact_bias(Naive(), values, chances, lam, G)
        assert naive < -10 * (0.9 / 0.1) / (2 * G)
        assert naive == pytest.approx(-17 * 0.9**G, rel=0.15)
    at_8, at_16 = (exact_bias(Jackknife(max_weight=None), values, chances, lam, G) for G in (8, 16))
    assert at_8 < -1
    assert at_16 > 1.5
    assert at_16 > abs(at_8)


def test_the_bias_orders_hold_again_once_the_group_sees_the_worst_reward():
    """What counts is G * p, not lambda: at p = 0.5 the jackknife is the worse one at G = 4, and right at G = 64."""
    values, chances, lam = [0.0, 1.0], [0.5, 0.5], 0.05
    small = [exact_bias(e, values, chances, lam, 4) for e in ESTIMATORS]
    assert abs(small[1]) > 1.5 * abs(small[0])
    naive, jackknife = (exact_bias(e, values, chances, lam, 64) for e in ESTIMATORS)
    assert naive == pytest.approx(-1 / (2 * 64), rel=0.05)
    assert abs(jackknife) < abs(naive) / 30


# --- Weights, and falling back


@both
@settings(max_examples=40, deadline=None)
@given(log_u=log_weights)
def test_weights_are_the_derivative(estimator, log_u):
    x = torch.tensor(log_u, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(estimator.log_mean(x), x)
    weights = estimator.weights(x.detach())
    torch.testing.assert_close(weights, gradient, rtol=0.0, atol=1e-12)
    G = len(log_u)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    low, high = (-(G - 1) / G, (2 * G - 1) / G) if isinstance(estimator, Jackknife) else (0, 1)
    assert (weights >= low - 1e-12).all()
    assert (weights <= high + 1e-12).all()


@both
def test_weights_of_masked_places_are_zero(estimator):
    log_u = torch.tensor([0.3, math.nan, -1.0, 2.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    weights = estimator.weights(log_u, mask)
    torch.testing.assert_close(weights[mask], estimator.weights(log_u[mask]), **TIGHT)
    assert weights[1] == 0


# One completion dominates the first group: jackknife weights 1.875 and -0.125. The second is even.
DOMINATED_AND_EVEN = [[20.0, 0, 0, 0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0, 0, 0, 0]]


def test_a_group_out_of_bounds_falls_back_to_naive_alone():
    log_u = torch.tensor(DOMINATED_AND_EVEN, dtype=torch.float64, requires_grad=True)
    bounded, free = Jackknife(max_weight=1.5), Jackknife(max_weight=None)
    assert bounded.falls_back(log_u).tolist() == [True, False]
    assert free.falls_back(log_u).tolist() == [False, False]
    assert Naive().falls_back(log_u).tolist() == [False, False]
    for i, same in enumerate([Naive(), free]):
        value = bounded.log_mean(log_u)[i]
        assert value.item() == same.log_mean(log_u)[i].item()
        (gradient,) = torch.autograd.grad(value, log_u)
        (expected,) = torch.autograd.grad(same.log_mean(log_u)[i], log_u)
        torch.testing.assert_close(gradient, expected, **TIGHT)
        torch.testing.assert_close(bounded.weights(log_u.detach())[i], expected[i], **TIGHT)
    assert abs(Naive().log_mean(log_u)[0].item() - free.log_mean(log_u)[0].item()) > 1


@pytest.mark.parametrize(("max_weight", "falls"), [(1.87, True), (1.88, False), (2.0, False)])
def test_the_bound_is_on_the_weight(max_weight, falls):
    log_u = torch.tensor(DOMINATED_AND_EVEN[0], dtype=torch.float64)
    assert Jackknife(max_weight=max_weight).falls_back(log_u).item() is falls


def test_masked_places_do_not_make_a_group_fall_back():
    log_u = torch.tensor([50.0, 0.1, 0.0, 0.0], dtype=torch.float64)
    mask = torch.tensor([False, True, True, True])
    assert Jackknife(max_weight=1.2).falls_back(log_u).item() is True
    assert Jackknife(max_weight=1.2).falls_back(log_u, mask).item() is False
