"""Means and leave-one-out sums in log space."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.logspace import leave_one_out_logsumexp, log_mean_exp

rows = st.lists(st.floats(-20, 20), min_size=2, max_size=8)
GENERATOR = torch.Generator().manual_seed(0)


def others(row: list[float], i: int) -> float:
    rest = row[:i] + row[i + 1 :]
    top = max(rest)
    return top if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in rest))


@settings(max_examples=50, deadline=None)
@given(row=rows)
def test_log_mean_exp_is_what_it_says(row):
    expected = math.log(sum(math.exp(x) for x in row) / len(row))
    assert log_mean_exp(torch.tensor(row, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)


def test_log_mean_exp_takes_an_axis_and_a_mask():
    x = torch.randn(3, 4, dtype=torch.float64, generator=GENERATOR)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True], [True, False, False, True]])
    for dim in (0, 1, -1):
        expected = ((x.exp() * mask).sum(dim) / mask.sum(dim)).log()
        torch.testing.assert_close(log_mean_exp(x, dim=dim, mask=mask), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_mean_exp(x, dim=dim), x.exp().mean(dim).log(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_mean_exp_keeps_masked_values_out_of_value_and_gradient(bad):
    x = torch.tensor([[0.5, bad, 1.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    value = log_mean_exp(x, mask=mask)
    assert value.item() == pytest.approx(math.log((math.exp(0.5) + math.exp(1.5)) / 2), abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    share = 1 / (1 + math.exp(1))
    assert gradient[0].tolist() == pytest.approx([share, 0.0, 1 - share], abs=1e-12)


@pytest.mark.parametrize("scale", [1e4, -1e4, 1e30])
def test_log_mean_exp_does_not_overflow(scale):
    x = torch.tensor([scale, scale, scale], dtype=torch.float32, requires_grad=True)
    value = log_mean_exp(x)
    assert value.item() == pytest.approx(scale, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.tolist() == pytest.approx([1 / 3] * 3, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(row=rows)
def test_leave_one_out_is_the_sum_of_the_others(row):
    got = leave_one_out_logsumexp(torch.tensor(row, dtype=torch.float64))
    assert got.tolist() == pytest.approx([others(row, i) for i in range(len(row))], abs=1e-12)


@pytest.mark.parametrize(
    "row",
    [
        [1e4, 0.0, 0.0, -3.0],  # subtracting from the total would leave nothing of the others
        [0.0, 1e-3, 1e4, 1e4],
        [-1e4, -1e4, -2e4],
        [40.0, 0.0],
    ],
)
def test_leave_one_out_does_not_cancel(row):
    x = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    got = leave_one_out_logsumexp(x)
    assert got.shape == x.shape
    assert got[0].tolist() == pytest.approx([others(row, i) for i in range(len(row))], abs=1e-12)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.sum().item() == pytest.approx(len(row), abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
def test_leave_one_out_among_the_kept(bad):
    x = torch.tensor([[0.3, bad, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True]])
    got = leave_one_out_logsumexp(x, mask)
    kept = [0.3, -1.0, 2.0]
    assert got[mask].tolist() == pytest.approx([others(kept, i) for i in range(3)], abs=1e-12)
    (gradient,) = torch.autograd.grad(got[mask].sum(), x)
    assert gradient.isfinite().all()
    assert gradient[0, 1] == 0


def test_nothing_that_counts_is_minus_infinity():
    mask = torch.tensor([[False, False], [True, False]])
    assert log_mean_exp(torch.zeros(2, 2), mask=mask).tolist() == [-math.inf, 0.0]
    left = leave_one_out_logsumexp(torch.tensor([[2.0, 5.0]]), torch.tensor([[True, False]]))
    assert left.tolist() == [[-math.inf, 2.0]]


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(4)])
def test_a_mask_of_another_shape_or_type_is_refused(mask):
    for function in (lambda x, m: log_mean_exp(x, mask=m), leave_one_out_logsumexp):
        with pytest.raises(ValueError, match=r"mask"):
            function(torch.zeros(4), mask)


def test_gradient_checks():
    x = torch.randn(2, 4, dtype=torch.float64, generator=GENERATOR).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    for function in (
        log_mean_exp,
        lambda y: log_mean_exp(y, mask=mask),
        leave_one_out_logsumexp,
        lambda y: leave_one_out_logsumexp(y, mask)[mask],
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
