"""Logarithms of sums and means, over a group or a group less one member."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """``log (1/n) sum_i exp(x_i)`` over the n entries along ``dim`` where ``mask`` (bool, shape of x) is True.

    The result drops ``dim``; it is -inf where no entry counts.

    >>> log_mean_exp(torch.tensor([1.0, 3.0]).log())  # log of the mean of 1 and 3
    tensor(0.6931)
    """
    if mask is None:
        return _logsumexp(x, dim) - math.log(x.shape[dim])
    _same_shape("log_mean_exp", x, mask)
    count = mask.sum(dim).to(x.dtype)
    return _logsumexp(x.masked_fill(~mask, -torch.inf), dim) - torch.log(count.clamp(min=1))


def leave_one_out_logsumexp(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``log sum_{j != i} exp(x_j)`` for each i of the last axis: [..., G] -> [..., G].

    The sums Z_-i of the jackknife in arXiv 2602.08813, section 4. Summed directly: ``log(S - exp(x_i))`` loses its
    digits when one member dominates. With ``mask`` the sum runs over the j that count; it is -inf where none is left.

    >>> leave_one_out_logsumexp(torch.tensor([1.0, 2.0, 3.0]).log()).exp()  # 2 + 3, 1 + 3, 1 + 2
    tensor([5., 4., 3.])
    """
    others = ~torch.eye(x.shape[-1], dtype=torch.bool, device=x.device)
    if mask is not None:
        _same_shape("leave_one_out_logsumexp", x, mask)
        others = others & mask.unsqueeze(-2)
    return _logsumexp(x.unsqueeze(-2).masked_fill(~others, -torch.inf), -1)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    # torch.logsumexp differentiates as exp(x - result). At x = 1e4 a float32 result is rounded to 1e-3, and the weights
    # are wrong by as much. Relative to the maximum the result is small and the rounding with it.
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0)
    return torch.logsumexp(x - top, dim) + top.squeeze(dim)


def _same_shape(name: str, x: Tensor, mask: Tensor) -> None:
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}: got x {tuple(x.shape)} and mask {tuple(mask.shape)} {mask.dtype}, "
            "expected one shape and a bool mask"
        )
