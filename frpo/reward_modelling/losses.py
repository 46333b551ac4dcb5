"""What a reward model is trained on: preference pairs, labels of 0 and 1, or values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from frpo.foundation import require
from frpo.functional.preference import binary_nll, bradley_terry_nll, squared_error

Transform = Literal["identity", "sigmoid"]


class RewardLoss(ABC):
    """A loss for each of ``N`` examples of ``K = responses`` scored responses and one target."""

    responses: int
    """K: 2 for a pair, the chosen response first; 1 for a labelled response."""

    @abstractmethod
    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Losses float [N] of ``scores`` float [N, K] and ``targets`` float [N]."""

    @abstractmethod
    def check_target(self, target: float) -> None:
        """Raise ``ValueError``, without the place, for a target this loss cannot be given."""

    def labelled(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Scores [M] with a label of 0 or 1 each [M], for the area under the ROC curve; None where there is none."""
        return None

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor | None:
        """1 where an example is decided rightly, 0.5 at a tie, else 0: float [N]; None where nothing is decided."""
        return None


class BradleyTerry(RewardLoss):
    """``-log sigmoid(chosen - rejected - margin)`` on pairs, with ``margin`` and the pair's own margin added up.

    Christiano et al. 2017 (arXiv 1706.03741, equation 1), Stiennon et al. 2020 (arXiv 2009.01325).

    Args:
        margin: by which the chosen response should win, in units of score.
        centring: weight of ``(chosen + rejected)^2``, which holds the scores near 0 (arXiv 2312.09244, section 2):
            a pair says nothing of their level.
    """

    responses = 2

    def __init__(self, margin: float = 0.0, centring: float = 0.0) -> None:
        self.margin = require.number("BradleyTerry.margin", margin)
        self.centring = require.number("BradleyTerry.centring", centring, at_least=0)

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        """See :class:`RewardLoss`; ``targets`` are the pairs' own margins."""
        chosen, rejected = scores.unbind(-1)
        loss = bradley_terry_nll(chosen=chosen, rejected=rejected, margin=self.margin + targets.to(scores.dtype))
        return loss + self.centring * (chosen + rejected).square()

    def check_target(self, target: float) -> None:
        """Refuse a margin that is not finite."""
        require.number("the margin", target)

    def labelled(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen responses are 1 and rejected ones 0, over all pairs."""
        return scores.flatten(), torch.tensor([1, 0], device=scores.device).expand(scores.shape).flatten()

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Whether the chosen response has the higher score."""
        return (1 + (scores[:, 0] - scores[:, 1]).sign()) / 2


class Binary(RewardLoss):
    """Cross-entropy of ``sigmoid(score)`` on labels of 0 and 1.

    Args:
        positive_weight: factor on the loss of label 1, for labels that are not balanced.
    """

    responses = 1

    def __init__(self, positive_weight: float = 1.0) -> None:
        self.positive_weight = require.number("Binary.positive_weight", positive_weight, above=0)

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        """See :class:`RewardLoss`."""
        labels = targets.to(scores.dtype)
        return binary_nll(scores[:, 0], labels) * (1 + (self.positive_weight - 1) * labels)

    def check_target(self, target: float) -> None:
        """Refuse anything but 0 and 1."""
        require.one_of("the label", target, (0, 1), "for graded values write `loss: Regression`")

    def labelled(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The responses and their labels."""
        return scores[:, 0], targets.long()

    def correct(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Whether the score is above 0 where the label is 1, and below where it is 0."""
        return (1 + scores[:, 0].sign() * (2 * targets.to(scores.dtype) - 1)) / 2


class Regression(RewardLoss):
    """Squared error on values.

    Args:
        transform: ``sigmoid`` compares ``sigmoid(score)``, with values in [0, 1]; ``identity`` the score itself. Score
            with the same ``transform`` of :class:`~frpo.rewards.model.RewardModel`.
    """

    responses = 1

    def __init__(self, transform: Transform = "identity") -> None:
        self.transform = require.one_of("Regression.transform", transform, Transform)

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        """See :class:`RewardLoss`."""
        values = scores[:, 0].sigmoid() if self.transform == "sigmoid" else scores[:, 0]
        return squared_error(values, targets.to(scores.dtype))

    def check_target(self, target: float) -> None:
        """Refuse a value that is not finite, or that a sigmoid cannot reach."""
        if self.transform == "sigmoid":
            require.number("the value", target, at_least=0, at_most=1, hint="others need `transform: identity`")
        else:
            require.number("the value", target)
