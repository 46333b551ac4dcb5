"""Means over the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Mean of ``x`` over the positions where ``mask`` is True; 0 where none is.

    ``x`` and ``mask`` (bool) have one shape [...]; the result drops ``dim``. Masked positions have no influence on the
    value, even where they hold NaN.

    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(2.)
    """
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masked_mean: got x {tuple(x.shape)} and mask {tuple(mask.shape)} {mask.dtype}, "
            "expected one shape and a bool mask"
        )
    total = torch.where(mask, x, 0).sum(dim)
    return total / mask.sum(dim).clamp(min=1)
