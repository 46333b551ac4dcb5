"""Importance ratios between the policy that is trained and the one that sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from frpo.functional.masked import masked_mean

# exp(20) = 5e8: far outside any clip range, and its gradient is still finite in float32.
LOG_RATIO_LIMIT = 20.0


def log_ratio(*, logps: Tensor, old_logps: Tensor | None, mask: Tensor) -> Tensor:
    """Token log-ratios ``logp - old_logp``, 0 where masked: all [..., T].

    ``old_logps=None`` is the on-policy case: the value is 0 and the gradient that of ``logps``.

    >>> old, new = torch.tensor([-2.0, -2.0]), torch.tensor([-1.5, -9.0])
    >>> log_ratio(logps=new, old_logps=old, mask=torch.tensor([True, False]))
    tensor([0.5000, 0.0000])
    """
    wrong_old = old_logps is not None and old_logps.shape != logps.shape
    if logps.shape != mask.shape or mask.dtype != torch.bool or wrong_old:
        raise ValueError(
            f"log_ratio: got logps {tuple(logps.shape)}, mask {tuple(mask.shape)} {mask.dtype}, "
            f"old_logps {None if old_logps is None else tuple(old_logps.shape)}, "
            "expected one shape and a bool mask"
        )
    new = torch.where(mask, logps, 0)
    old = new.detach() if old_logps is None else torch.where(mask, old_logps.detach(), 0)
    return new - old


def exp_ratio(log_ratios: Tensor) -> Tensor:
    """Ratios from their logarithms, which are kept within +-LOG_RATIO_LIMIT: any shape.

    >>> exp_ratio(torch.tensor([0.0, 1000.0]))
    tensor([1.0000e+00, 4.8517e+08])
    """
    return log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clip_ratio(ratio: Tensor, *, clip_low: float, clip_high: float, upper: Tensor | None = None) -> Tensor:
    """``min(rho, clip(rho, 1 - clip_low, 1 + clip_high))``; the ``max`` of the two where ``upper`` is True.

    ``upper`` is bool, broadcastable to ``ratio``. PPO's pessimistic bound of a loss ``c * rho`` is the minimum where
    c < 0 and the maximum where c > 0 (arXiv 1707.06347, equation 7). The released trainer of arXiv 2602.08813 always
    takes the minimum.

    >>> rho = torch.tensor([0.5, 1.0, 2.0])
    >>> clip_ratio(rho, clip_low=0.2, clip_high=0.2)
    tensor([0.5000, 1.0000, 1.2000])
    >>> clip_ratio(rho, clip_low=0.2, clip_high=0.2, upper=torch.tensor(True))
    tensor([0.8000, 1.0000, 2.0000])
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    lower = torch.minimum(ratio, clipped)
    return lower if upper is None else torch.where(upper, torch.maximum(ratio, clipped), lower)


def token_mean_ratio(
    log_ratios: Tensor, mask: Tensor, *, clip_low: float, clip_high: float, upper: Tensor | None = None
) -> Tensor:
    """``a_i = (1/T_i) sum_t s_it``, one clipped ratio s_it per token (arXiv 2602.08813, section 4): [..., T] -> [...].

    >>> logs = torch.tensor([[0.0, 1.0]])
    >>> token_mean_ratio(logs, torch.tensor([[True, True]]), clip_low=0.2, clip_high=0.2)  # (1 + 1.2) / 2
    tensor([1.1000])
    """
    side = None if upper is None else upper.unsqueeze(-1)
    return masked_mean(clip_ratio(exp_ratio(log_ratios), clip_low=clip_low, clip_high=clip_high, upper=side), mask)


def sequence_ratio(
    log_ratios: Tensor, mask: Tensor, *, clip_low: float, clip_high: float, upper: Tensor | None = None
) -> Tensor:
    """``a_i``, one clipped ratio per sequence, of ``rho_i = exp((1/T_i) sum_t log rho_it)``: [..., T] -> [...].

    >>> logs = torch.tensor([[0.0, 0.2]])
    >>> sequence_ratio(logs, torch.tensor([[True, True]]), clip_low=0.2, clip_high=0.2)  # exp(0.1)
    tensor([1.1052])
    """
    return clip_ratio(exp_ratio(masked_mean(log_ratios, mask)), clip_low=clip_low, clip_high=clip_high, upper=upper)
