"""Entropic risk and the worst case within a KL budget: against a scan of the dual and a solution of the primal."""

from __future__ import annotations

import math
import random

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.robust import (
    entropic_risk,
    solve_lambda,
    solve_shared_lambda,
    tilted_weights,
    worst_case_reward,
)

RHOS = [0.01, 0.1, 0.5, 1.0, 1.9]


def rows(seed: int, count: int = 4, size: int = 8, scale: float = 1.0) -> list[list[float]]:
    generator = random.Random(seed)
    return [[scale * generator.uniform(0, 1) for _ in range(size)] for _ in range(count)]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- Entropic risk


@pytest.mark.parametrize("lam", [0.05, 0.5, 1.0, 20.0])
def test_entropic_risk_agrees_with_loops(lam):
    groups = rows(0)
    expected = [oracles.entropic_risk(group, lam) for group in groups]
    assert entropic_risk(double(groups), lam).tolist() == pytest.approx(expected, abs=1e-12)
    assert entropic_risk(double(groups).T, lam, dim=0).tolist() == pytest.approx(expected, abs=1e-12)


def test_entropic_risk_runs_from_the_minimum_to_the_mean():
    rewards = double(rows(1))
    torch.testing.assert_close(entropic_risk(rewards, 1e-4), rewards.min(-1).values, rtol=0, atol=1e-3)
    torch.testing.assert_close(entropic_risk(rewards, 1e6), rewards.mean(-1), rtol=0, atol=1e-6)
    values = [entropic_risk(rewards, lam)[0].item() for lam in (0.01, 0.1, 1.0, 10.0)]
    assert values == sorted(values)


def test_entropic_risk_is_finite_at_ten_thousand_in_float32():
    rewards = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    value = entropic_risk(rewards, 1e-4)
    (gradient,) = torch.autograd.grad(value, rewards)
    assert value.item() == pytest.approx(1e-4 * math.log(3), abs=1e-7)
    assert gradient.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_the_gradient_of_the_entropic_risk_is_the_tilted_distribution():
    rewards = double(rows(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(entropic_risk(rewards, 0.3).sum(), rewards)
    torch.testing.assert_close(gradient, tilted_weights(rewards.detach(), 0.3), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda r: entropic_risk(r, 0.3), rewards)


@pytest.mark.parametrize("lam", [0.05, 0.5, 20.0])
def test_tilted_weights_agree_with_loops(lam):
    groups = rows(3)
    expected = double([oracles.tilted(group, lam) for group in groups])
    torch.testing.assert_close(tilted_weights(double(groups), lam), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tilted_weights(double(groups).T, lam, dim=0), expected.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [entropic_risk, tilted_weights])
@pytest.mark.parametrize("lam", [0.0, -1.0, math.nan])
def test_lambda_must_be_positive(function, lam):
    with pytest.raises(ValueError, match=rf"(?s)lam.*{lam}"):
        function(torch.zeros(3), lam)


# --- Worst case at a budget


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e-3])
@pytest.mark.parametrize("rho", RHOS)
def test_worst_case_agrees_with_primal_and_dual(rho, scale):
    groups = rows(4, count=3, scale=scale)
    values = worst_case_reward(double(groups), rho)
    lams = solve_lambda(double(groups), rho)
    assert values.shape == lams.shape == (3,)
    for i, group in enumerate(groups):
        primal, tilt = oracles.worst_case_primal(group, rho)
        dual, _ = oracles.solve_dual([group], rho)
        assert values[i].item() == pytest.approx(primal, abs=1e-8 * max(scale, 1))
        assert values[i].item() == pytest.approx(dual, abs=1e-8 * max(scale, 1))
        assert lams[i].item() == pytest.approx(tilt, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(group=st.lists(st.floats(-2, 2), min_size=2, max_size=9), rho=st.floats(0.001, 3))
def test_worst_case_agrees_with_the_primal_anywhere(group, rho):
    expected, _ = oracles.worst_case_primal(group, rho)
    got = worst_case_reward(double(group), rho)
    assert got.shape == ()
    assert got.item() == pytest.approx(expected, abs=1e-6)
    assert min(group) - 1e-9 <= got.item() <= sum(group) / len(group) + 1e-9


@pytest.mark.parametrize("rho", [0.05, 0.4, 0.69])
def test_two_outcomes_by_brute_force(rho):
    """Between two rewards Q is one number: the largest q on the worse one with KL(q || 1/2) <= rho."""
    left, right = 0.5, 1.0
    for _ in range(200):
        q = (left + right) / 2
        left, right = (q, right) if oracles.kl_to_uniform([q, 1 - q]) <= rho else (left, q)
    got = worst_case_reward(double([0.2, 0.8]), rho)
    assert got.item() == pytest.approx(0.2 * left + 0.8 * (1 - left), abs=1e-9)


def test_the_tilt_at_the_solved_lambda_spends_the_budget():
    rewards = double(rows(5))
    for rho in RHOS:
        lams = solve_lambda(rewards, rho)
        for i in range(len(rewards)):
            q = tilted_weights(rewards[i], lams[i].item())
            assert oracles.kl_to_uniform(q.tolist()) == pytest.approx(rho, rel=1e-6)


@pytest.mark.parametrize(
    ("group", "count"), [([0.0, 1.0, 0.5, 0.7], 1), ([0.0, 0.0, 1.0, 0.5], 2), ([0.3, 0.3, 0.3, 0.3], 4)]
)
def test_a_budget_for_all_mass_on_the_minima_needs_no_multiplier(group, count):
    enough = math.log(4 / count) + 1e-6
    assert solve_lambda(double(group), enough).item() == 0.0
    assert worst_case_reward(double(group), enough).item() == pytest.approx(min(group), abs=1e-12)
    if count < 4:
        assert solve_lambda(double(group), enough - 0.05).item() > 0.0
        assert worst_case_reward(double(group), enough - 0.05).item() > min(group)


def test_rows_are_solved_apart():
    groups = [[0.0, 1.0, 0.5, 0.7], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 1.0, 0.5]]
    for rho in (0.2, 1.0, 2.0):
        together = solve_lambda(double(groups), rho)
        alone = [solve_lambda(double(group), rho).item() for group in groups]
        assert together.tolist() == pytest.approx(alone, rel=1e-9)


def test_a_larger_budget_is_a_worse_case_and_a_smaller_lambda():
    rewards = double(rows(6))
    values = torch.stack([worst_case_reward(rewards, rho) for rho in RHOS])
    lams = torch.stack([solve_lambda(rewards, rho) for rho in RHOS])
    assert (values.diff(dim=0) < 0).all()
    assert (lams.diff(dim=0) < 0).all()


def test_a_tiny_budget_is_the_mean_less_the_spread():
    """Small rho: worst case = mean - sqrt(2 rho var), lambda = sqrt(var / (2 rho))."""
    rewards, rho = double(rows(7)), 1e-6
    deviation = rewards.std(-1, correction=0)
    torch.testing.assert_close(
        worst_case_reward(rewards, rho), rewards.mean(-1) - math.sqrt(2 * rho) * deviation, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(solve_lambda(rewards, rho), deviation / math.sqrt(2 * rho), rtol=1e-2, atol=0.0)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_units_of_the_reward(shift, scale):
    rewards = double(rows(8))
    moved = worst_case_reward(rewards * scale + shift, 0.3)
    expected = worst_case_reward(rewards, 0.3) * scale + shift
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        solve_lambda(rewards * scale + shift, 0.3), solve_lambda(rewards, 0.3) * scale, rtol=1e-5, atol=1e-9
    )


def test_float32_is_good_enough():
    rewards = rows(9)
    got = worst_case_reward(torch.tensor(rewards), 0.3)
    torch.testing.assert_close(got.double(), worst_case_reward(double(rewards), 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [worst_case_reward, solve_lambda, solve_shared_lambda])
@pytest.mark.parametrize("rho", [0.0, -0.1, math.nan])
def test_a_bad_budget_is_refused(function, rho):
    with pytest.raises(ValueError, match=rf"(?s)rho.*{rho}"):
        function(torch.zeros(3), rho)


# --- Rewards that do not count, and one multiplier for all groups


@pytest.mark.parametrize("bad", [math.nan, -50.0, math.inf, 0.0])
def test_masked_rewards_are_inert(bad):
    groups = [[0.1, bad, 0.8, 0.4], [bad, 0.6, bad, 0.2]]
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]])
    kept = [[0.1, 0.8, 0.4], [0.6, 0.2]]
    for rho in (0.1, 0.5, 0.8):
        values, lams = (f(double(groups), rho, mask) for f in (worst_case_reward, solve_lambda))
        for i, group in enumerate(kept):
            value, lam = oracles.worst_case_primal(group, rho)
            assert values[i].item() == pytest.approx(value, abs=1e-9)
            assert lams[i].item() == pytest.approx(lam, rel=1e-6)
    _, shared = oracles.solve_dual(kept, 0.3)
    assert solve_shared_lambda(double(groups), 0.3, mask).item() == pytest.approx(shared, rel=1e-4)


def test_a_row_without_rewards_has_no_worst_case():
    groups, mask = double([[0.1, 0.8], [5.0, 6.0]]), torch.tensor([[True, True], [False, False]])
    values = worst_case_reward(groups, 0.2, mask)
    assert values.isnan().tolist() == [False, True]
    assert solve_lambda(groups, 0.2, mask)[1].item() == 0.0
    shared = solve_shared_lambda(groups, 0.2, mask)
    assert shared.item() == pytest.approx(solve_lambda(groups[0], 0.2).item(), rel=1e-9)
    assert solve_shared_lambda(groups, 0.2, torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("rho", [0.02, 0.3, 0.9])
def test_a_shared_lambda_maximises_the_mean_dual(rho):
    groups = [*rows(10, count=3, size=6), [0.2] * 6, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    lam = solve_shared_lambda(double(groups), rho).item()
    _, expected = oracles.solve_dual(groups, rho)
    assert lam == pytest.approx(expected, rel=1e-4)
    spent = [oracles.kl_to_uniform(oracles.tilted(group, lam)) for group in groups]
    assert sum(spent) / len(spent) == pytest.approx(rho, rel=1e-6)


def test_a_shared_lambda_is_zero_where_the_mean_budget_reaches_all_minima():
    groups = [[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.5]]
    reach = (math.log(3) + math.log(1.5)) / 3
    assert solve_shared_lambda(double(groups), reach + 1e-6).item() == 0.0
    assert solve_shared_lambda(double(groups), reach - 0.05).item() > 0.0
