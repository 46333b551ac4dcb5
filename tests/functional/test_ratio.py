"""Importance ratios and their clip."""

from __future__ import annotations

import math

import oracles
import pytest
import torch

from frpo.functional.ratio import clip_ratio, log_ratio, sequence_ratio, token_mean_ratio


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


RATIOS = [0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 5.0]


def test_sides_of_the_clip():
    ratios = double(RATIOS)
    low = clip_ratio(ratios, clip_low=0.2, clip_high=0.28)
    assert low.tolist() == pytest.approx([0.1, 0.79, 0.81, 1.0, 1.27, 1.28, 1.28], abs=1e-12)
    high = clip_ratio(ratios, clip_low=0.2, clip_high=0.28, upper=torch.ones(7, dtype=torch.bool))
    assert high.tolist() == pytest.approx([0.8, 0.8, 0.81, 1.0, 1.27, 1.29, 5.0], abs=1e-12)
    mixed = clip_ratio(ratios, clip_low=0.2, clip_high=0.28, upper=torch.tensor([True, False] * 3 + [True]))
    assert mixed.tolist() == pytest.approx([0.8, 0.79, 0.81, 1.0, 1.27, 1.28, 5.0], abs=1e-12)


def test_what_is_clipped_has_no_gradient():
    for upper, expected in [(None, [1, 1, 1, 1, 1, 0, 0]), (torch.tensor(True), [0, 0, 1, 1, 1, 1, 1])]:
        ratios = double(RATIOS).requires_grad_()
        clip_ratio(ratios, clip_low=0.2, clip_high=0.28, upper=upper).sum().backward()
        assert ratios.grad.tolist() == expected


def test_a_ratio_of_one_has_its_whole_gradient_even_with_no_room_to_clip():
    """On-policy the ratio stands on the corner of a clip of width 0: its gradient must not be halved there."""
    for upper in (None, torch.tensor(True)):
        ratios = double([1.0]).requires_grad_()
        clip_ratio(ratios, clip_low=0.2, clip_high=0.2, upper=upper).sum().backward()
        assert ratios.grad.tolist() == [1.0]


def test_log_ratios():
    logps, old = double([[-1.0, -2.0, -3.0]]).requires_grad_(), double([[-1.5, -1.0, -7.0]]).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    logs = log_ratio(logps=logps, old_logps=old, mask=mask)
    assert logs.tolist() == [[0.5, -1.0, 0.0]]
    logs.sum().backward()
    assert logps.grad.tolist() == [[1.0, 1.0, 0.0]]
    assert old.grad is None, "the policy that acted is a constant"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_log_ratios_are_zero_whatever_stands_there(bad):
    logps = double([[-1.0, bad]]).requires_grad_()
    mask = torch.tensor([[True, False]])
    for old, expected in [(None, 0.0), (double([[-1.5, bad]]), 0.5)]:
        logs = log_ratio(logps=logps, old_logps=old, mask=mask)
        assert logs.tolist() == [[expected, 0.0]]
        (gradient,) = torch.autograd.grad(logs.sum(), logps)
        assert gradient.tolist() == [[1.0, 0.0]]


def test_on_policy_log_ratios_are_zero_with_the_gradient_of_the_log_probabilities():
    logps = double([[-1.0, -2.0]]).requires_grad_()
    logs = log_ratio(logps=logps, old_logps=None, mask=torch.tensor([[True, False]]))
    assert logs.tolist() == [[0.0, 0.0]]
    logs.sum().backward()
    assert logps.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_gaps_stay_finite_in_float32(gap):
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for function in (token_mean_ratio, sequence_ratio):
        for upper in (None, torch.tensor([True])):
            logs = log_ratio(logps=logps, old_logps=logps.detach() - gap, mask=mask)
            a = function(logs, mask, clip_low=0.2, clip_high=0.2, upper=upper)
            (gradient,) = torch.autograd.grad(a.sum(), logps)
            assert a.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("function", "level"), [(token_mean_ratio, "token"), (sequence_ratio, "sequence")])
@pytest.mark.parametrize("side", ["min", "max"])
def test_ratios_of_completions_agree_with_loops(function, level, side):
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) * 0.5
    mask = torch.tensor([4, 2, 1, 3, 4, 2]).view(2, 3, 1) > torch.arange(4)
    upper = torch.full((2, 3), side == "max")
    got = function(logs, mask, clip_low=0.2, clip_high=0.28, upper=upper)
    assert got.shape == (2, 3)
    zeros = [0.0] * 4
    for i in range(2):
        for j in range(3):
            row, keep = logs[i, j].tolist(), mask[i, j].tolist()
            expected = oracles.surrogate(row, zeros, keep, level=level, low=0.2, high=0.28, side=side)
            assert got[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_a_sequence_has_one_ratio_of_the_mean_not_the_sum():
    logs, mask = double([[0.1, 0.3]]), torch.ones(1, 2, dtype=torch.bool)
    got = sequence_ratio(logs, mask, clip_low=0.5, clip_high=5.0)
    assert got.item() == pytest.approx(math.exp(0.2), abs=1e-12)


@pytest.mark.parametrize("argument", ["old_logps", "mask"])
def test_mismatched_shapes_are_refused(argument):
    tensors = {
        "logps": torch.zeros(2, 3),
        "old_logps": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    tensors[argument] = tensors[argument][:, :2]
    with pytest.raises(ValueError, match=rf"{argument} \(2, 2\)"):
        log_ratio(**tensors)
