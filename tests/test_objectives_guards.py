"""What the objectives refuse, what they report, which side of the clip they take, and their mean over groups."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import TIGHT, arguments_for, every_objective, loss_and_gradient
from oracles import Settings

from frpo.estimators import Jackknife, Naive
from frpo.objectives import FRPO, GRPO

BAD = [math.nan, math.inf, -math.inf]


# --- What users get wrong


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_lambda_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match=rf"(?s)lam.*{value}"):
        FRPO(lam=value)


@pytest.mark.parametrize("make", [FRPO, GRPO])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("clip_low", -0.1),
        ("clip_low", 1.5),
        ("clip_high", -0.2),
        ("clip_low", math.nan),
        ("clip_high", math.nan),
        ("ratio", "word"),
    ],
)
def test_bad_settings_are_refused_by_name(make, argument, value):
    with pytest.raises(ValueError, match=rf"(?s){argument}.*{value}"):
        make(**{argument: value})


def test_an_unknown_clip_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"(?s)clip.*pop") as error:
        FRPO(clip="pop")
    assert "ppo" in str(error.value)
    assert "reference" in str(error.value)


@every_objective
def test_a_group_of_one_is_refused(objective):
    arguments = arguments_for(11, G=2)
    single = {key: value if value is None else value[:, :1] for key, value in arguments.items()}
    with pytest.raises(ValueError, match=r"at least 2, got 1"):
        objective(**single)


@every_objective
@pytest.mark.parametrize(
    ("argument", "index"),
    [
        ("rewards", (slice(None), slice(0, 4))),
        ("rewards", (slice(0, 2),)),
        ("mask", (slice(None), slice(None), slice(0, 2))),
        ("old_logps", (slice(None), slice(None), slice(0, 2))),
        ("reward_mask", (slice(None), slice(0, 4))),
        ("logps", (0,)),
    ],
)
def test_mismatched_shapes_are_refused_by_name(objective, argument, index):
    arguments = arguments_for(12)
    arguments["reward_mask"] = torch.ones(3, 5, dtype=torch.bool)
    arguments[argument] = arguments[argument][index]
    with pytest.raises(ValueError, match=r"rewards|mask|logps"):
        objective(**arguments)


@every_objective
def test_a_mask_of_numbers_is_refused(objective):
    arguments = arguments_for(12)
    arguments["mask"] = arguments["mask"].float()
    with pytest.raises((TypeError, ValueError), match=r"(?s)mask.*float(32|64).*bool|mask.*bool.*float(32|64)"):
        objective(**arguments)


@every_objective
@pytest.mark.parametrize(("argument", "bad"), [("rewards", x) for x in BAD] + [("logps", math.nan)])
def test_values_that_count_and_are_not_finite_show_in_the_loss(objective, argument, bad):
    """They must not be hidden by a clamp or a mask; training stops on them and names the prompt."""
    arguments = arguments_for(13)
    spoiled = arguments[argument].detach().clone()
    spoiled[(1, 0) if argument == "rewards" else (1, 0, 0)] = bad
    arguments[argument] = spoiled.requires_grad_(argument == "logps")
    assert not objective(**arguments).loss.isfinite()
    if argument == "rewards":
        finite = objective.coefficients(spoiled).isfinite().all(-1)
        assert finite.tolist() == [True, False, True]


# --- Metrics


@every_objective
def test_metrics_are_detached_finite_scalars(objective):
    out = objective(**arguments_for(14, masked_rewards=True))
    assert out.metrics
    for key, value in out.metrics.items():
        value = torch.as_tensor(value)
        assert value.numel() == 1, key
        assert not value.requires_grad, key
        assert value.isfinite().all(), key


def test_metrics_by_hand():
    """Two groups: one of four with a failure (three count), one with equal rewards."""
    rewards = torch.tensor([[0.0, 1.0, 0.5, 9.0], [0.4, 0.4, 0.4, 0.4]], dtype=torch.float64)
    members = torch.tensor([[True, True, True, False], [True, True, True, True]])
    logps = torch.zeros(2, 4, 1, dtype=torch.float64)
    mask = torch.ones(2, 4, 1, dtype=torch.bool)
    lam = 0.1
    w = [math.exp(-r / lam) for r in (0.0, 1.0, 0.5)]
    ess = sum(w) ** 2 / sum(x * x for x in w)
    free = FRPO(lam=lam, estimator=Jackknife(max_weight=None))(logps, rewards, mask, None, members).metrics
    assert free["zero_variance"].item() == pytest.approx(0.5, abs=1e-12)
    assert free["ess"].item() == pytest.approx((ess + 4) / 2, abs=1e-9)
    settings = Settings(lam=lam, baseline=False)
    negative = sum(c < 0 for c in oracles.on_policy_coefficients([0.0, 1.0, 0.5], settings))
    assert negative > 0
    assert free["negative_weights"].item() == pytest.approx(negative / 3 / 2, abs=1e-12)
    assert free["jackknife_fallback"].item() == 0.0
    bounded = FRPO(lam=lam, estimator=Jackknife(max_weight=1.2))(logps, rewards, mask, None, members).metrics
    assert bounded["jackknife_fallback"].item() == pytest.approx(0.5, abs=1e-12)
    assert bounded["negative_weights"].item() == 0.0
    grpo = GRPO()(logps, rewards, mask, None, members).metrics
    assert grpo["zero_variance"].item() == pytest.approx(0.5, abs=1e-12)


def test_a_group_that_falls_back_has_the_naive_loss_and_the_others_keep_theirs():
    arguments = arguments_for(15, P=2, off_policy=False)
    arguments["rewards"] = torch.tensor([[0.0, 1, 1, 1, 1], [0.5, 0.51, 0.5, 0.5, 0.5]], dtype=torch.float64)
    gradients = [
        loss_and_gradient(FRPO(lam=0.1, estimator=estimator), arguments)[1]
        for estimator in (Jackknife(max_weight=1.2), Naive(), Jackknife(max_weight=None))
    ]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], **TIGHT)
    torch.testing.assert_close(gradients[0][1], gradients[2][1], **TIGHT)
    assert (gradients[1][0] - gradients[2][0]).abs().max() > 0.01


# --- Sides of the clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [Naive(), Jackknife(max_weight=None)])
def test_a_coefficient_of_zero_takes_the_minimum_whatever_the_rounding(estimator, dtype):
    for G in range(2, 17):
        rewards = torch.full((1, G), 0.3, dtype=dtype)
        upper = FRPO(lam=0.3, estimator=estimator, clip="ppo").upper_side(rewards)
        assert not upper.any(), G


def test_sides_of_the_clip_follow_the_reward():
    rewards = torch.tensor([[0.0, 0.5, 1.0]])
    assert FRPO(clip="ppo").upper_side(rewards).tolist() == [[True, False, False]]
    assert GRPO().upper_side(rewards).tolist() == [[True, False, False]]
    assert FRPO(clip="reference").upper_side(rewards) is None


# --- Completions without tokens, and groups of other ranks


@every_objective
def test_a_judged_completion_without_tokens_counts_as_ratio_one(objective):
    arguments = arguments_for(16)
    mask = arguments["mask"].clone()
    mask[1, 2] = False
    loss, gradient = loss_and_gradient(objective, {**arguments, "mask": mask})
    unmoved = {key: arguments[key].detach().clone() for key in ("logps", "old_logps")}
    unmoved["logps"][1, 2] = unmoved["old_logps"][1, 2]
    expected_loss, expected = loss_and_gradient(
        objective, {**arguments, **unmoved, "logps": unmoved["logps"].requires_grad_()}
    )
    torch.testing.assert_close(loss, expected_loss, **TIGHT)
    assert (gradient[1, 2] == 0).all()
    expected[1, 2] = 0
    torch.testing.assert_close(gradient, expected, **TIGHT)


@every_objective
def test_ranks_with_different_numbers_of_groups_average_to_the_mean_over_all_groups(objective):
    """Rank one keeps one group of three, rank two keeps all three: the average of their gradients is the whole's."""
    rewards = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    members = torch.ones(6, 5, dtype=torch.bool)
    members[:2] = False
    whole = objective.coefficients(rewards, members)
    halves = [objective.coefficients(rewards[i : i + 3], members[i : i + 3], None, 2.0) for i in (0, 3)]
    torch.testing.assert_close(torch.cat(halves) / 2, whole, **TIGHT)


def test_losses_of_each_group():
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    a = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.5
    members = torch.tensor([[True] * 4, [True, False, False, False], [True, False, True, True]])
    objective = FRPO(lam=2.0, estimator=Jackknife(max_weight=None))
    losses, kept = objective.group_losses(a, rewards, members)
    assert kept.tolist() == [True, False, True]
    settings = Settings(lam=2.0)
    for p in (0, 2):
        group = [x[p][members[p]].tolist() for x in (a, rewards)]
        assert losses[p].item() == pytest.approx(2.0 * oracles.group_loss(*group, settings), abs=1e-10)
    assert losses[1].item() == 0.0
    whole = objective.group_loss(a, rewards, members).item()
    assert whole == pytest.approx((losses[0] + losses[2]).item() / 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_groups", [None, 0.0, 1.5])
@every_objective
def test_a_rank_without_groups_adds_zeros(objective, num_groups, dtype):
    rewards = torch.rand(2, 3, dtype=dtype)
    members = torch.zeros(2, 3, dtype=torch.bool)
    a = torch.ones(2, 3, dtype=dtype)
    assert objective.group_loss(a, rewards, members, num_groups).item() == 0.0
    assert (objective.coefficients(rewards, members, a, num_groups) == 0).all()


@every_objective
def test_rewards_may_be_wider_than_the_log_probabilities(objective):
    """Rewards are float64 in a scored batch, log-probabilities float32."""
    wide = arguments_for(17)
    mixed = {**wide, "logps": wide["logps"].detach().float().requires_grad_(), "old_logps": wide["old_logps"].float()}
    loss, gradient = loss_and_gradient(objective, mixed)
    expected_loss, expected = loss_and_gradient(objective, wide)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)
