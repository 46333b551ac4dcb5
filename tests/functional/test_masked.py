"""Means over what a mask keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.functional.masked import masked_mean


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_mean_over_kept_values_only(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 4, 5, generator=generator) < 0.6
    mask[..., 0] = True
    got = masked_mean(x, mask)
    for i in range(3):
        for j in range(4):
            kept = [x[i, j, t].item() for t in range(5) if mask[i, j, t]]
            assert got[i, j].item() == pytest.approx(sum(kept) / len(kept), abs=1e-12)


def test_dim_chooses_the_axis():
    x = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(x, mask, dim=0).tolist() == [2.0, 8.0]
    assert masked_mean(x, mask, dim=-1).tolist() == [1.0, 5.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_values_leak_into_neither_value_nor_gradient(bad):
    x = torch.tensor([[1.0, bad, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    value = masked_mean(x, mask)
    assert value.tolist() == [2.0]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.tolist() == [[0.5, 0.0, 0.5]]


def test_gradient_check():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda y: masked_mean(y, mask), x)


def test_an_empty_row_has_neither_nan_nor_gradient():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[False, False], [True, True]])
    value = masked_mean(x, mask)
    assert value.tolist() == [0.0, 3.5]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_mismatched_shapes_are_refused():
    with pytest.raises((ValueError, AssertionError), match="mask"):
        masked_mean(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
