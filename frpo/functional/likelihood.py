"""Negative log-likelihood of given tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from frpo.functional.logprobs import token_logprobs


def completion_nll(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of each token in nats, 0 where masked.

    Shapes: ``logits`` [..., V], already shifted so that each position predicts its entry of ``ids`` (int64 [...]);
    ``mask`` bool [...] -> [...] in float32 or wider. The sum divided by ``mask.sum()`` is the loss of supervised
    fine-tuning.

    >>> completion_nll(torch.zeros(2, 4), torch.tensor([1, 3]), torch.tensor([True, False]))  # uniform over 4: log 4
    tensor([1.3863, 0.0000])
    """
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"completion_nll: got ids {tuple(ids.shape)} and mask {tuple(mask.shape)} {mask.dtype}, expected one shape "
            "and a bool mask"
        )
    return torch.where(mask, -token_logprobs(logits, ids), 0)
