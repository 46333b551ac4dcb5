"""Schedules: values against the formulas, and state that resumes."""

from __future__ import annotations

import math
import random
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.robust import solve_lambda
from frpo.schedules import AdaptiveKL, Constant, Cosine, KLBudget, Linear

CURVES = [(Linear, oracles.linear), (Cosine, oracles.cosine)]
curves = pytest.mark.parametrize(("schedule", "oracle"), CURVES, ids=["linear", "cosine"])
FULL = torch.ones(2, 4, dtype=torch.bool)


def rewards(seed: int, P: int = 2, G: int = 4) -> torch.Tensor:
    return torch.rand(P, G, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_constant():
    assert [Constant(0.3).value(step) for step in (0, 7, 10**6)] == [0.3] * 3


@curves
@settings(max_examples=50, deadline=None)
@given(
    start=st.floats(0, 5),
    end=st.floats(0, 5),
    warmup=st.integers(0, 20),
    length=st.integers(1, 50),
    step=st.integers(0, 100),
)
def test_values(schedule, oracle, start, end, warmup, length, step):
    steps = warmup + length
    got = schedule(start, end, steps, warmup=warmup).value(step)
    assert isinstance(got, float)
    assert got == pytest.approx(oracle(step, start, end, steps, warmup), abs=1e-12)


@curves
def test_corners(schedule, oracle):
    made = schedule(2.0, 0.5, 30, warmup=10)
    assert [made.value(step) for step in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0], abs=1e-12)
    assert made.value(20) == pytest.approx(1.25, abs=1e-12)
    assert [made.value(step) for step in (30, 31, 1000)] == [0.5] * 3
    assert schedule(2.0, 0.5, 30).value(0) == 2.0


def test_a_cosine_is_flat_at_its_ends_and_a_line_is_not():
    line, cosine = Linear(1.0, 0.0, 1000), Cosine(1.0, 0.0, 1000)
    assert 1 - cosine.value(10) < 0.1 * (1 - line.value(10))
    assert cosine.value(990) < 0.1 * line.value(990)
    assert cosine.value(250) == pytest.approx((1 + math.cos(math.pi / 4)) / 2, abs=1e-12)


@curves
@pytest.mark.parametrize(
    ("argument", "value"), [("steps", 0), ("steps", -3), ("warmup", -1), ("start", math.nan), ("end", math.inf)]
)
def test_bad_curves_are_refused_by_name(schedule, oracle, argument, value):
    with pytest.raises(ValueError, match=rf"(?s){argument}.*{value}"):
        schedule(**{"start": 1.0, "end": 0.0, "steps": 10, **{argument: value}})


@curves
def test_a_warmup_longer_than_the_steps_is_refused(schedule, oracle):
    with pytest.raises(ValueError, match=r"steps: got 10, expected more than 11; the warmup"):
        schedule(1.0, 0.0, 10, warmup=11)


def test_a_constant_must_be_a_number():
    with pytest.raises(ValueError, match=r"(?s)value.*nan"):
        Constant(math.nan)


# --- Adaptive


@pytest.mark.parametrize("gain", [0.1, 0.5])
def test_adaptive_kl_follows_ziegler(gain):
    generator = random.Random(0)
    kls = [generator.uniform(0, 0.2) for _ in range(50)]
    schedule = AdaptiveKL(initial=0.05, target=0.1, gain=gain)
    assert schedule.value(0) == 0.05
    for i, kl in enumerate(kls):
        schedule.observe(kl=kl, rewards=rewards(i), reward_mask=FULL)
        expected = oracles.ziegler(0.05, kls[: i + 1], 0.1, gain)
        assert schedule.value(i + 1) == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_gain_is_a_tenth_by_default():
    schedule = AdaptiveKL(initial=1.0, target=1.0)
    schedule.observe(kl=1.1, rewards=rewards(0), reward_mask=FULL)
    assert schedule.value(1) == pytest.approx(1.01, abs=1e-12)


@pytest.mark.parametrize(("kl", "factor"), [(100.0, 1.02), (1.1, 1.01), (1.0, 1.0), (0.9, 0.99), (0.0, 0.98)])
def test_adaptive_kl_is_clipped_on_both_sides(kl, factor):
    schedule = AdaptiveKL(initial=2.0, target=1.0, gain=0.1)
    schedule.observe(kl=kl, rewards=rewards(0), reward_mask=FULL)
    assert schedule.value(1) == pytest.approx(2.0 * factor, abs=1e-12)


def test_adaptive_kl_reaches_its_target():
    """A toy world in which the KL is inverse to beta."""
    schedule = AdaptiveKL(initial=1.0, target=0.05)
    for step in range(600):
        schedule.observe(kl=0.01 / schedule.value(step), rewards=rewards(0), reward_mask=FULL)
    assert 0.01 / schedule.value(600) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("initial", 0.0), ("initial", -1.0), ("target", 0.0), ("target", -0.1), ("gain", -0.1), ("target", math.nan)],
)
def test_bad_adaptive_settings_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=rf"(?s){argument}.*{value}"):
        AdaptiveKL(**{"initial": 0.1, "target": 0.1, **{argument: value}})


# --- Lambda from a budget


def test_a_budget_starts_at_its_initial_value():
    assert KLBudget(0.3, initial=0.7).value(0) == 0.7


def see(schedule: KLBudget, groups: list[list[float]] | torch.Tensor, mask: torch.Tensor | None = None) -> float:
    groups = torch.as_tensor(groups, dtype=torch.float64)
    mask = torch.ones_like(groups, dtype=torch.bool) if mask is None else mask
    schedule.observe(kl=0.0, rewards=groups, reward_mask=mask)
    return schedule.value(1)


def test_a_budget_solves_the_dual_of_the_rewards_it_saw():
    row = rewards(1, P=1, G=6)
    got = see(KLBudget(0.3, initial=0.7, smoothing=1.0), row.expand(3, 6))
    _, expected = oracles.worst_case_primal(row[0].tolist(), 0.3)
    assert got == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx(solve_lambda(row[0], 0.3).item(), rel=1e-6)


@pytest.mark.parametrize("rho", [0.05, 0.4])
def test_a_budget_is_shared_by_the_groups(rho):
    groups = rewards(4, P=3, G=6).tolist()
    _, expected = oracles.solve_dual(groups, rho)
    assert see(KLBudget(rho, smoothing=1.0), groups) == pytest.approx(expected, rel=1e-4)


def test_a_budget_moves_part_of_the_way_on_a_log_scale():
    row = rewards(1, P=1, G=6)
    target = solve_lambda(row[0], 0.3).item()
    schedule = KLBudget(0.3, initial=0.7, smoothing=0.25)
    assert see(schedule, row) == pytest.approx(0.7**0.75 * target**0.25, rel=1e-6)
    for _ in range(80):
        see(schedule, row)
    assert schedule.value(1) == pytest.approx(target, rel=1e-6)


def test_a_budget_remembers_a_window_of_groups():
    first, second = rewards(5, P=2, G=6), rewards(6, P=2, G=6) * 3
    short, long = (KLBudget(0.3, window=window, smoothing=1.0) for window in (2, 4))
    see(short, first)
    see(long, first)
    _, alone = oracles.solve_dual(second.tolist(), 0.3)
    _, together = oracles.solve_dual([*first.tolist(), *second.tolist()], 0.3)
    assert see(short, second) == pytest.approx(alone, rel=1e-4)
    assert see(long, second) == pytest.approx(together, rel=1e-4)


def test_a_budget_out_of_reach_stops_at_the_minimum():
    """Two rewards cannot show a KL beyond log 2."""
    assert see(KLBudget(1.0, minimum=0.05, smoothing=1.0), [[0.0, 1.0]]) == pytest.approx(0.05, rel=1e-12)


def test_a_budget_ignores_what_was_not_judged():
    row = rewards(2, P=1, G=6)
    mask = torch.tensor([[True, True, False, True, False, True]])
    _, expected = oracles.worst_case_primal(row[mask].tolist(), 0.2)
    for hidden in (math.nan, 0.0, -50.0):
        got = see(KLBudget(0.2, smoothing=1.0), row.masked_fill(~mask, hidden), mask)
        assert got == pytest.approx(expected, rel=1e-6)
    single = torch.tensor([[True] * 6, [True] + [False] * 5])
    groups = torch.cat([row, row * 9])
    assert see(KLBudget(0.2, smoothing=1.0), groups, single) == pytest.approx(
        see(KLBudget(0.2, smoothing=1.0), row), rel=1e-9
    )


def test_a_budget_keeps_its_value_when_nothing_was_judged():
    schedule = KLBudget(0.2, initial=0.7)
    assert see(schedule, torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool)) == 0.7


@pytest.mark.parametrize(
    ("argument", "value"),
    [("initial", 0.0), ("window", 0), ("smoothing", 0.0), ("smoothing", 1.5), ("minimum", 0.0), ("minimum", 2.0)],
)
def test_bad_budget_settings_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=rf"KLBudget.{argument}: got {value}, expected"):
        KLBudget(0.3, **{argument: value})


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan])
def test_a_bad_budget_is_refused(rho):
    with pytest.raises(ValueError, match=rf"(?s)rho.*{rho}"):
        KLBudget(rho)


# --- State


MAKERS = {
    "constant": lambda: Constant(0.4),
    "linear": lambda: Linear(1.0, 0.1, 40, warmup=4),
    "cosine": lambda: Cosine(1.0, 0.1, 40, warmup=4),
    "adaptive": lambda: AdaptiveKL(initial=0.1, target=0.05, gain=0.3),
    "budget": lambda: KLBudget(0.3, initial=0.5),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("stop", [0, 3, 17])
def test_a_resumed_schedule_continues_identically(make, stop, tmp_path: Path):
    generator = random.Random(3)
    kls = [generator.uniform(0, 0.2) for _ in range(30)]

    def play(schedule, first: int, last: int) -> list[float]:
        values = []
        for step in range(first, last):
            schedule.observe(kl=kls[step], rewards=rewards(step), reward_mask=FULL)
            values.append(schedule.value(step + 1))
        return values

    whole = play(make(), 0, 30)
    interrupted = make()
    before = play(interrupted, 0, stop)
    torch.save(interrupted.state_dict(), tmp_path / "state.pt")
    play(interrupted, stop, 30)
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert before + play(resumed, stop, 30) == whole


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_lower_bound_is_below_every_value(make):
    schedule = make()
    values = [schedule.value(0)]
    for step in range(60):
        schedule.observe(kl=0.0, rewards=torch.ones(2, 4), reward_mask=FULL)
        values.append(schedule.value(step + 1))
    assert schedule.lower_bound() <= min(values)


def test_lower_bounds():
    assert Constant(-0.2).lower_bound() == -0.2
    assert Linear(2.0, 0.5, 10).lower_bound() == 0.5
    assert Cosine(0.5, 2.0, 10).lower_bound() == 0.5
    assert Linear(2.0, 0.5, 10, warmup=1).lower_bound() == 0.0
    assert AdaptiveKL(initial=1.0, target=1.0).lower_bound() > 0
    assert KLBudget(0.3, minimum=0.02).lower_bound() == 0.02


@pytest.mark.parametrize(
    ("writer", "reader"),
    [("adaptive", "constant"), ("constant", "adaptive"), ("adaptive", "budget"), ("budget", "linear")],
)
def test_a_state_of_another_schedule_is_refused(writer, reader):
    source = MAKERS[writer]()
    source.observe(kl=0.2, rewards=rewards(0), reward_mask=FULL)
    with pytest.raises(ValueError, match="another schedule"):
        MAKERS[reader]().load_state_dict(source.state_dict())


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused(kl):
    with pytest.raises(ValueError, match=rf"(?s)kl.*{kl}"):
        AdaptiveKL(initial=1.0, target=1.0).observe(kl=kl, rewards=rewards(0), reward_mask=FULL)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_state_is_a_copy(make):
    schedule = make()
    schedule.observe(kl=0.2, rewards=rewards(0), reward_mask=FULL)
    state = schedule.state_dict()
    kept = schedule.value(1)
    for i in range(5):
        schedule.observe(kl=0.0, rewards=rewards(i + 5), reward_mask=FULL)
    again = make()
    again.load_state_dict(state)
    assert again.value(1) == kept
