"""Properties of the objectives: invariances, inert slots, dropped groups, extreme values."""

from __future__ import annotations

import math

import pytest
import torch
from cases import TIGHT, arguments_for, every_objective, loss_and_gradient, random_case, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import Settings

from frpo.estimators import Jackknife, Naive
from frpo.objectives import FRPO, GRPO

BAD = [math.nan, math.inf, -math.inf]
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- Invariances


@every_objective
@quick
@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5))
def test_a_constant_added_to_the_rewards_changes_nothing(objective, seed, shift):
    arguments = arguments_for(seed)
    loss, gradient = loss_and_gradient(objective, arguments)
    shifts = torch.tensor([[shift], [-shift], [0.5]], dtype=torch.float64)
    moved = loss_and_gradient(objective, {**arguments, "rewards": arguments["rewards"] + shifts})
    torch.testing.assert_close(moved, (loss, gradient), **TIGHT)


@every_objective
@quick
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_the_order_of_the_completions_does_not_matter(objective, seed, order):
    arguments = arguments_for(seed, masked_rewards=True)
    loss, gradient = loss_and_gradient(objective, arguments)
    order = torch.tensor(order)
    permuted = {
        key: value if value is None else value[:, order].detach().requires_grad_(key == "logps")
        for key, value in arguments.items()
    }
    moved_loss, moved_gradient = loss_and_gradient(objective, permuted)
    torch.testing.assert_close(moved_loss, loss, **TIGHT)
    torch.testing.assert_close(moved_gradient, gradient[:, order], **TIGHT)


@every_objective
def test_a_group_does_not_see_the_others(objective):
    arguments = arguments_for(1)
    _, together = loss_and_gradient(objective, arguments)
    for p in range(3):
        alone = {
            key: value if value is None else value[p : p + 1].detach().requires_grad_(key == "logps")
            for key, value in arguments.items()
        }
        _, gradient = loss_and_gradient(objective, alone)
        torch.testing.assert_close(together[p] * 3, gradient[0], **TIGHT)


@every_objective
def test_on_policy_is_the_old_policy_being_the_policy(objective):
    arguments = arguments_for(2, off_policy=False)
    explicit = {**arguments, "old_logps": arguments["logps"].detach().clone()}
    torch.testing.assert_close(loss_and_gradient(objective, arguments), loss_and_gradient(objective, explicit), **TIGHT)


# --- Slots that do not count


@every_objective
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("bad", [*BAD, 1e30])
def test_masked_tokens_are_inert(objective, off_policy, bad):
    arguments = arguments_for(3, off_policy=off_policy)
    mask = arguments["mask"]
    assert not mask.all()
    expected = loss_and_gradient(objective, arguments)
    spoiled = {**arguments, "logps": arguments["logps"].detach().masked_fill(~mask, bad).requires_grad_()}
    if off_policy:
        spoiled["old_logps"] = arguments["old_logps"].masked_fill(~mask, bad)
    got = loss_and_gradient(objective, spoiled)
    torch.testing.assert_close(got, expected, **TIGHT)
    assert (got[1][~mask] == 0).all()


@every_objective
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("tokens", [True, False], ids=["with-tokens", "without-tokens"])
@pytest.mark.parametrize("bad", BAD)
def test_unjudged_completions_are_inert(objective, off_policy, tokens, bad):
    arguments = arguments_for(4, masked_rewards=True, off_policy=off_policy)
    kept = arguments["reward_mask"]
    assert not kept.all()
    expected = loss_and_gradient(objective, arguments)
    spoiled = {
        **arguments,
        "rewards": arguments["rewards"].masked_fill(~kept, bad),
        "logps": arguments["logps"].detach().masked_fill(~kept.unsqueeze(-1), bad).requires_grad_(),
        "mask": arguments["mask"] & (kept | tokens).unsqueeze(-1),
    }
    got = loss_and_gradient(objective, spoiled)
    torch.testing.assert_close(got, expected, **TIGHT)
    assert (got[1][~kept] == 0).all()
    for ratios in (None, torch.ones(3, 5, dtype=torch.float64).masked_fill(~kept, bad)):
        coefficients = objective.coefficients(spoiled["rewards"], kept, ratios)
        assert coefficients.isfinite().all()
        assert (coefficients[~kept] == 0).all()


@every_objective
def test_leaving_the_group_is_never_having_been_in_it(objective):
    arguments = arguments_for(5, P=1, G=6)
    kept = torch.tensor([[True, False, True, True, False, True]])
    loss, gradient = loss_and_gradient(objective, {**arguments, "reward_mask": kept})
    smaller = {
        key: value if value is None else value[:, kept[0]].detach().requires_grad_(key == "logps")
        for key, value in arguments.items()
    }
    expected_loss, expected = loss_and_gradient(objective, smaller)
    torch.testing.assert_close(loss, expected_loss, **TIGHT)
    torch.testing.assert_close(gradient[:, kept[0]], expected, **TIGHT)
    assert (gradient[:, ~kept[0]] == 0).all()


@every_objective
@pytest.mark.parametrize("left", [0, 1])
def test_a_group_with_under_two_judged_completions_is_dropped(objective, left):
    arguments = arguments_for(6)
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[1, left:] = False
    spoiled = {
        **arguments,
        "rewards": arguments["rewards"].masked_fill(~kept, math.nan),
        "logps": arguments["logps"].detach().masked_fill(~kept.unsqueeze(-1), math.nan).requires_grad_(),
        "reward_mask": kept,
    }
    loss, gradient = loss_and_gradient(objective, spoiled)
    assert (objective.coefficients(spoiled["rewards"], kept)[1] == 0).all()
    others = {
        key: value if value is None else value[[0, 2]].detach().requires_grad_(key == "logps")
        for key, value in arguments.items()
    }
    expected_loss, expected = loss_and_gradient(objective, others)
    torch.testing.assert_close(loss, expected_loss, **TIGHT)
    torch.testing.assert_close(gradient[[0, 2]], expected, **TIGHT)
    assert (gradient[1] == 0).all()


@every_objective
@pytest.mark.parametrize("left", [0, 1])
def test_nothing_judged_is_loss_zero_and_gradient_zero(objective, left):
    arguments = arguments_for(7)
    kept = torch.zeros(3, 5, dtype=torch.bool)
    kept[:, :left] = True
    loss, gradient = loss_and_gradient(objective, {**arguments, "reward_mask": kept})
    assert loss.item() == 0.0
    assert (gradient == 0).all()
    assert (objective.coefficients(arguments["rewards"], kept) == 0).all()


@pytest.mark.parametrize("G", [2, 3, 8])
@pytest.mark.parametrize("estimator", [Naive(), Jackknife(), Jackknife(max_weight=None)])
def test_equal_rewards_give_no_gradient_with_the_baseline(estimator, G):
    arguments = arguments_for(8, G=G, off_policy=False)
    arguments["rewards"] = torch.full_like(arguments["rewards"], 0.3)
    _, gradient = loss_and_gradient(FRPO(lam=0.1, estimator=estimator), arguments)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **TIGHT)


# --- Extreme values


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("off_policy", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("estimator", [Naive(), Jackknife(), Jackknife(max_weight=None)])
@pytest.mark.parametrize("G", [2, 8])
def test_exponents_of_ten_thousand_stay_finite_in_float32(estimator, off_policy, baseline, G):
    arguments = tensors(random_case(9, Settings(), G=G, off_policy=off_policy), dtype=torch.float32)
    rewards = torch.ones(3, G)
    rewards[:, 0] = 0.0
    rewards[1, -1] = 0.5
    rewards[2] = torch.linspace(0, 1, G)
    arguments["rewards"] = rewards
    lam = 0.5e-4
    assert ((rewards.mean(-1) - rewards.min(-1).values) / lam).max() >= 1e4 * (1 - 1e-6)
    objective = FRPO(lam=lam, estimator=estimator, baseline=baseline)
    loss, gradient = loss_and_gradient(objective, arguments)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    coefficients = objective.coefficients(rewards)
    assert coefficients.isfinite().all()
    assert (coefficients[:, 0] > 0).all(), "all the weight is on the worst completion"


def test_the_limit_of_a_vanishing_lambda():
    """One worst completion takes all the weight; its leave-one-out term then counts G - 1 times."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    naive = FRPO(lam=1e-4, estimator=Naive()).coefficients(rewards)
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(naive, expected, **TIGHT)
    jackknife = FRPO(lam=1e-4, estimator=Jackknife(max_weight=None)).coefficients(rewards)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(jackknife, expected, **TIGHT)


@pytest.mark.parametrize("objective", [FRPO(lam=0.5), GRPO()], ids=["FRPO", "GRPO"])
def test_half_precision_is_computed_in_float32(objective):
    def cast(arguments: dict, dtype: torch.dtype) -> dict:
        floats = {k: v for k, v in arguments.items() if v is not None and v.is_floating_point()}
        made = {k: v.detach().to(dtype).requires_grad_(k == "logps") for k, v in floats.items()}
        return {**arguments, **made}

    narrow = cast(arguments_for(10), torch.bfloat16)
    as_float = cast(narrow, torch.float64)
    loss, _ = loss_and_gradient(objective, narrow)
    expected, _ = loss_and_gradient(objective, as_float)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
