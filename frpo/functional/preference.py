"""Losses on scores: which of two is preferred, whether a label holds, how far a score is from its value."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_nll(*, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Negative log-probability that the chosen of two is preferred: ``-log sigmoid(chosen - rejected - margin)``.

    Bradley-Terry on scores, Christiano et al. 2017 (arXiv 1706.03741, equation 1), Stiennon et al. 2020 (arXiv
    2009.01325); the margin as in Llama 2 (arXiv 2307.09288, equation 2). All float [N]; returns [N], in nats.
    Scores that differ by the margin alone give log 2.

    >>> from torch import tensor
    >>> bradley_terry_nll(chosen=tensor([3.0]), rejected=tensor([2.0]), margin=tensor([1.0]))
    tensor([0.6931])
    """
    assert chosen.shape == rejected.shape == margin.shape, f"{chosen.shape}, {rejected.shape}, {margin.shape}"
    return F.softplus(rejected + margin - chosen)


def binary_nll(scores: Tensor, labels: Tensor) -> Tensor:
    """``-y log sigmoid(s) - (1 - y) log(1 - sigmoid(s))``: float [N], labels y in [0, 1] of the same shape; nats.

    >>> from torch import tensor
    >>> binary_nll(tensor([0.0, 20.0]), tensor([1.0, 1.0]))
    tensor([6.9315e-01, 2.0612e-09])
    """
    assert scores.shape == labels.shape, f"{scores.shape}, {labels.shape}"
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


def squared_error(scores: Tensor, values: Tensor) -> Tensor:
    """``(s - y)^2``: float [N], values y of the same shape.

    >>> from torch import tensor
    >>> squared_error(tensor([1.0, 2.0]), tensor([1.0, 0.0]))
    tensor([0., 4.])
    """
    assert scores.shape == values.shape, f"{scores.shape}, {values.shape}"
    return (scores - values).square()
