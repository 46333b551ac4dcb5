"""The oracle against the values of the released trainer, and against itself by independent routes."""

from __future__ import annotations

import math
import random

import oracles
import pytest
from cases import REFERENCE_COUNT, grouped, released_case, released_cases, released_mask
from oracles import Settings


def penalty(raw: dict, logps: list) -> float:
    rows = [row for group in logps for row in group]
    return raw["beta"] * oracles.k3_penalty(rows, raw["ref_logps"], released_mask(raw))


def test_there_are_24_reference_cases():
    raws = released_cases()
    assert len(raws) == REFERENCE_COUNT
    assert {raw["jackknife"] for raw in raws} == {True, False}
    assert {raw["level"] for raw in raws} == {"token", "sequence"}


@pytest.mark.parametrize("index", range(REFERENCE_COUNT))
def test_oracle_loss_is_the_reference_loss(index):
    raw = released_cases()[index]
    case = released_case(raw)
    assert case.loss() + penalty(raw, case.logps) == pytest.approx(raw["loss"], abs=1e-9)


@pytest.mark.parametrize("index", range(REFERENCE_COUNT))
def test_oracle_gradient_is_the_reference_gradient(index):
    raw = released_cases()[index]
    case = released_case(raw)
    G, T = raw["group_size"], len(raw["logps"][0])

    def total(flat: list[float]) -> float:
        logps = grouped(grouped(flat, T), G)
        return case.loss(logps) + penalty(raw, logps)

    got = oracles.finite_difference(total, [x for row in raw["logps"] for x in row])
    assert got == pytest.approx([x for row in raw["grad"] for x in row], abs=1e-9)


@pytest.mark.parametrize("jackknife", [True, False])
@pytest.mark.parametrize("baseline", [True, False])
def test_closed_form_coefficients_are_the_derivative_at_ratio_one(jackknife, baseline):
    settings = Settings(lam=0.4, jackknife=jackknife, baseline=baseline)
    rewards = [0.1, 0.7, 0.35, 0.9, 0.2]
    derivative = oracles.finite_difference(lambda a: oracles.group_loss(a, rewards, settings), [1.0] * 5)
    assert derivative == pytest.approx(oracles.on_policy_coefficients(rewards, settings), abs=1e-9)


@pytest.mark.parametrize("jackknife", [True, False])
def test_decimal_and_float_log_means_agree(jackknife):
    log_u = [0.3, -1.2, 2.0, 0.0]
    plain = oracles.jackknife_log_mean if jackknife else oracles.naive_log_mean
    assert oracles.exact_log_mean(log_u, jackknife=jackknife) == pytest.approx(
        plain([math.exp(x) for x in log_u]), abs=1e-13
    )


@pytest.mark.parametrize("rho", [0.01, 0.1, 0.5, 1.0, 3.0])
def test_dual_scan_and_primal_bisection_agree(rho):
    generator = random.Random(4)
    for size in (2, 3, 8):
        rewards = [generator.uniform(-1, 2) for _ in range(size)]
        value, lam = oracles.solve_dual([rewards], rho)
        primal, tilt = oracles.worst_case_primal(rewards, rho)
        assert value == pytest.approx(primal, abs=1e-8)
        assert lam == pytest.approx(tilt, rel=1e-4, abs=1e-8)


def test_no_policy_within_the_budget_does_worse_than_the_worst_case():
    generator = random.Random(5)
    rewards, rho = [0.1, 0.4, 0.8, 1.0], 0.3
    worst, _ = oracles.worst_case_primal(rewards, rho)
    closest = math.inf
    for _ in range(20000):
        mass = [generator.gammavariate(generator.choice([0.3, 1.0, 4.0]), 1) + 1e-12 for _ in rewards]
        q = [m / sum(mass) for m in mass]
        if oracles.kl_to_uniform(q) <= rho:
            reward = sum(a * b for a, b in zip(q, rewards, strict=True))
            assert reward >= worst - 1e-9
            closest = min(closest, reward)
    assert closest < worst + 0.02


def test_finite_differences_of_a_known_function():
    got = oracles.finite_difference(lambda x: math.sin(x[0]) * math.exp(x[1]), [0.3, -0.2])
    assert got == pytest.approx([math.cos(0.3) * math.exp(-0.2), math.sin(0.3) * math.exp(-0.2)], abs=1e-11)


def test_multinomial_probabilities_sum_to_one():
    total = sum(oracles.multinomial(c, [0.2, 0.3, 0.5]) for c in oracles.compositions(9, 3))
    assert total == pytest.approx(1.0, abs=1e-12)
