"""FRPO and GRPO against the released trainer, the oracle in loops, and the closed form of the method."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from cases import (
    REFERENCE_COUNT,
    build_frpo,
    build_grpo,
    loss_and_gradient,
    random_case,
    released_case,
    released_cases,
    tensors,
)
from oracles import Settings

from frpo.estimators import Jackknife, Naive
from frpo.functional.kl import k3
from frpo.functional.masked import masked_mean
from frpo.objectives import FRPO, GRPO

TIGHT = {"rtol": 0.0, "atol": 1e-9}
VARIANTS = [
    Settings(lam=lam, jackknife=jackknife, baseline=baseline, low=0.2, high=0.28, level=level, clip=clip)
    for lam, (jackknife, baseline, level, clip) in zip(
        itertools.cycle([0.3, 2.0, 0.7]),
        itertools.product([True, False], [True, False], ["token", "sequence"], ["reference", "ppo"]),
        strict=False,
    )
]


def name(settings: Settings) -> str:
    estimator = "jackknife" if settings.jackknife else "naive"
    baseline = "baseline" if settings.baseline else "plain"
    return f"{estimator}-{baseline}-{settings.level}-{settings.clip}-{settings.lam}"


# --- The released trainer


@pytest.mark.parametrize("index", range(REFERENCE_COUNT))
def test_loss_and_gradient_of_the_released_trainer(index):
    raw = released_cases()[index]
    case = released_case(raw)
    arguments = tensors(case)
    ref_logps = torch.tensor(raw["ref_logps"], dtype=torch.float64).view_as(arguments["logps"])
    penalty = masked_mean(k3(arguments["logps"], ref_logps), arguments["mask"]).mean()
    loss = build_frpo(case.settings)(**arguments).loss + raw["beta"] * penalty
    (gradient,) = torch.autograd.grad(loss, arguments["logps"])
    assert loss.item() == pytest.approx(raw["loss"], abs=1e-9)
    expected = torch.tensor(raw["grad"], dtype=torch.float64).view_as(gradient)
    torch.testing.assert_close(gradient, expected, **TIGHT)


# --- The oracle


@pytest.mark.parametrize("masked_rewards", [False, True], ids=["all-judged", "some-failed"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("settings", VARIANTS, ids=name)
def test_frpo_agrees_with_the_oracle(settings, off_policy, masked_rewards):
    case = random_case(11, settings, G=5, off_policy=off_policy, masked_rewards=masked_rewards)
    loss, gradient = loss_and_gradient(build_frpo(settings), tensors(case))
    assert loss.item() == pytest.approx(case.loss(), abs=1e-9)
    torch.testing.assert_close(gradient, torch.tensor(case.gradient(), dtype=torch.float64), **TIGHT)


def test_the_oracle_cases_reach_every_side_of_the_clip():
    """Off-policy inputs where no ratio is clipped, or where both clips agree, would prove nothing."""
    case = random_case(11, VARIANTS[0], G=5)
    ppo = case.with_settings(VARIANTS[1])
    assert VARIANTS[0].clip == "reference"
    assert VARIANTS[1].clip == "ppo"
    ratios = [
        a - b
        for p, group in enumerate(case.logps)
        for g, row in enumerate(group)
        for a, b, m in zip(row, case.old[p][g], case.mask[p][g], strict=True)
        if m
    ]
    assert min(ratios) < -0.23
    assert max(ratios) > 0.25
    assert abs(case.with_settings(VARIANTS[0]).loss() - ppo.loss()) > 1e-3


@pytest.mark.parametrize("masked_rewards", [False, True], ids=["all-judged", "some-failed"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_agrees_with_the_oracle(level, off_policy, masked_rewards):
    settings = Settings(low=0.1, high=0.3, level=level)
    case = random_case(12, settings, G=5, off_policy=off_policy, masked_rewards=masked_rewards)
    loss, gradient = loss_and_gradient(build_grpo(settings), tensors(case))
    assert loss.item() == pytest.approx(case.loss(objective=oracles.grpo_loss), abs=1e-9)
    expected = torch.tensor(case.gradient(oracles.grpo_loss), dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, **TIGHT)


@pytest.mark.parametrize("settings", VARIANTS[:4], ids=name)
def test_first_and_second_derivatives_check(settings):
    case = random_case(13, settings, P=2, G=3, T=2)
    arguments = tensors(case)

    def loss(logps):
        return build_frpo(settings)(**{**arguments, "logps": logps}).loss

    assert torch.autograd.gradcheck(loss, arguments["logps"])
    assert torch.autograd.gradgradcheck(loss, arguments["logps"])


# --- Coefficients: the two-pass form of the same loss


@pytest.mark.parametrize("masked_rewards", [False, True], ids=["all-judged", "some-failed"])
@pytest.mark.parametrize("settings", [v for v in VARIANTS if v.level == "token"], ids=name)
def test_coefficients_are_the_derivative_of_the_loss_by_the_ratios(settings, masked_rewards):
    case = random_case(14, settings, G=5, masked_rewards=masked_rewards)
    G = 5
    ratios = torch.rand(3, G, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5

    def loss(flat: list[float]) -> float:
        a = [flat[p * G : (p + 1) * G] for p in range(3)]
        return oracles.frpo_loss_of_ratios(a, case.rewards, case.reward_mask, settings)

    arguments = tensors(case)
    got = build_frpo(settings).coefficients(arguments["rewards"], arguments["reward_mask"], ratios)
    expected = oracles.finite_difference(loss, ratios.flatten().tolist())
    torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("lam", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("jackknife", [True, False])
def test_on_policy_coefficients_are_the_closed_form(jackknife, baseline, lam):
    settings = Settings(lam=lam, jackknife=jackknife, baseline=baseline)
    case = random_case(15, settings, P=2, G=6, off_policy=False)
    expected = [
        [max(lam, 1.0) * c / 2 for c in oracles.on_policy_coefficients(group, settings)] for group in case.rewards
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    objective, arguments = build_frpo(settings), tensors(case)
    torch.testing.assert_close(objective.coefficients(arguments["rewards"]), expected, **TIGHT)
    _, gradient = loss_and_gradient(objective, arguments)
    weights = expected.unsqueeze(-1) * arguments["mask"] / arguments["mask"].sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, weights, **TIGHT)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("estimator", [Naive(), Jackknife(max_weight=None)])
def test_on_policy_coefficients_sum_to_zero_with_the_baseline_and_to_one_without(estimator, baseline):
    rewards = torch.rand(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    total = FRPO(lam=0.3, estimator=estimator, baseline=baseline).coefficients(rewards).sum()
    assert total.item() == pytest.approx(0.0 if baseline else 1.0, abs=1e-12)


def test_grpo_coefficients_are_minus_the_advantages_over_the_group():
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.9, 0.7]], dtype=torch.float64)
    reward_mask = torch.tensor([[True, True, True], [True, False, True]])
    expected = torch.tensor([[0.5 / 3 / 2, -0.5 / 3 / 2, 0.0], [0.25 / 2 / 2, 0.0, -0.25 / 2 / 2]], dtype=torch.float64)
    torch.testing.assert_close(GRPO().coefficients(rewards, reward_mask), expected, **TIGHT)


@pytest.mark.parametrize("settings", VARIANTS, ids=name)
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_group(settings):
    """Pass one: a_i without gradient. Pass two: sum_i coefficient_i a_i(theta), piece by piece."""
    case = random_case(16, settings, G=6)
    arguments = tensors(case)
    _, whole = loss_and_gradient(build_frpo(settings), arguments)

    def surrogate(logps: list, p: int, g: int) -> float:
        signs = oracles.on_policy_coefficients(case.rewards[p], settings)
        side = "max" if settings.clip == "ppo" and signs[g] > 0 else "min"
        return oracles.surrogate(
            logps, case.old[p][g], case.mask[p][g], level=settings.level, low=0.2, high=0.28, side=side
        )

    a = torch.tensor([[surrogate(case.logps[p][g], p, g) for g in range(6)] for p in range(3)], dtype=torch.float64)
    coefficients = build_frpo(settings).coefficients(arguments["rewards"], None, a)
    for p, g in itertools.product(range(3), range(6)):
        slope = oracles.finite_difference(lambda row, p=p, g=g: surrogate(row, p, g), case.logps[p][g])
        expected = coefficients[p, g] * torch.tensor(slope, dtype=torch.float64)
        torch.testing.assert_close(whole[p, g], expected, **TIGHT)


# --- GRPO: rewards over their standard deviation


def test_scaled_rewards_do_not_depend_on_the_unit_of_the_reward():
    arguments = tensors(random_case(17, Settings(), G=6))
    objective = GRPO(scale_rewards=True)
    _, gradient = loss_and_gradient(objective, arguments)
    _, scaled = loss_and_gradient(objective, {**arguments, "rewards": arguments["rewards"] * 37 - 5})
    torch.testing.assert_close(gradient, scaled, rtol=1e-3, atol=1e-9)
    _, plain = loss_and_gradient(GRPO(), arguments)
    group = plain[0][plain[0] != 0] / gradient[0][plain[0] != 0]
    torch.testing.assert_close(group, group[0].expand_as(group))
    assert (group > 0).all()


def test_rewards_are_scaled_by_the_sample_deviation_of_the_judged():
    """Rewards 0, 1, 0.5 of three judged: mean 0.5, deviation 0.5 with one degree of freedom taken."""
    rewards = torch.tensor([[0.0, 1.0, 0.5, 7.0]], dtype=torch.float64)
    reward_mask = torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[0.5, -0.5, 0.0, 0.0]], dtype=torch.float64) / (0.5 + 1e-4) / 3
    torch.testing.assert_close(GRPO(scale_rewards=True).coefficients(rewards, reward_mask), expected, **TIGHT)


def test_scaled_equal_rewards_give_no_gradient():
    arguments = tensors(random_case(17, Settings(), G=6))
    arguments["rewards"] = torch.full_like(arguments["rewards"], 0.7)
    loss, gradient = loss_and_gradient(GRPO(scale_rewards=True), arguments)
    assert loss.isfinite()
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **TIGHT)


# --- Clips, by hand


@pytest.mark.parametrize(
    ("clip", "reward", "expected"),
    [
        ("reference", 0.0, 1.2),  # a bad completion that became likelier: min hides it
        ("ppo", 0.0, 2.0),  # and ppo keeps pushing it down
        ("reference", 1.0, 1.2),
        ("ppo", 1.0, 1.2),  # a good completion that became likelier: enough
    ],
)
def test_sides_of_the_clip_by_hand(clip, reward, expected):
    """Two completions of one token; the first has ratio 2, the second ratio 1."""
    rewards = torch.tensor([[reward, 0.5]], dtype=torch.float64)
    logps = torch.tensor([[[0.0], [0.0]]], dtype=torch.float64)
    old = logps - torch.tensor([[[2.0], [1.0]]], dtype=torch.float64).log()
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    loss = FRPO(lam=1.0, estimator=Naive(), clip=clip)(logps, rewards, mask, old).loss
    settings = Settings(jackknife=False)
    by_hand = oracles.frpo_loss_of_ratios([[expected, 1.0]], rewards.tolist(), None, settings)
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)


def test_the_share_of_clipped_tokens_by_hand():
    ratios = torch.tensor([[[0.7, 0.9, 1.1, 1.3], [1.0, 5.0, 5.0, 5.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True, True, True], [True, True, False, False]]])
    share = FRPO(clip_low=0.2, clip_high=0.28).clipped_share(ratios.log(), mask, old_logps=torch.zeros_like(ratios))
    torch.testing.assert_close(share, torch.tensor([[0.5, 0.5]], dtype=torch.float64), **TIGHT)


# --- Limits


@pytest.mark.parametrize("clip", ["reference", "ppo"])
@pytest.mark.parametrize("estimator", [Naive(), Jackknife(max_weight=None), Jackknife()])
def test_a_large_lambda_is_grpo(estimator, clip):
    """Naive: c -> -A_i/G, the advantage against the mean of the group.

    Jackknife: c -> -A_i/(G-1), the advantage r_i - mean_{j != i} r_j against the mean of the *others* (RLOO).
    """
    arguments = tensors(random_case(18, Settings(), G=6, off_policy=False, masked_rewards=True))
    _, grpo = loss_and_gradient(GRPO(), arguments)
    if isinstance(estimator, Jackknife):
        n = arguments["reward_mask"].sum(-1, keepdim=True).unsqueeze(-1)
        assert n.min() >= 2
        assert n.unique().numel() > 1
        grpo = grpo * n / (n - 1)
    for lam, tolerance in [(1e2, 1e-2), (1e5, 1e-5)]:
        _, frpo = loss_and_gradient(FRPO(lam=lam, estimator=estimator, clip=clip), arguments)
        assert (frpo - grpo).abs().max() <= tolerance * grpo.abs().max()


def test_the_estimators_agree_as_the_group_grows():
    generator = torch.Generator().manual_seed(3)
    gaps = []
    sizes = [8, 32, 128, 512]
    for G in sizes:
        rewards = torch.rand(1, G, dtype=torch.float64, generator=generator)
        naive = FRPO(lam=0.5, estimator=Naive()).coefficients(rewards)
        jackknife = FRPO(lam=0.5, estimator=Jackknife(max_weight=None)).coefficients(rewards)
        gaps.append((G * (naive - jackknife)).abs().mean().item())
    assert oracles.slope(sizes, gaps) == pytest.approx(-1.0, abs=0.15)
