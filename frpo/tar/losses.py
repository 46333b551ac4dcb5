"""What an attacked policy should still do, as losses that tamper resistance (arXiv 2408.00761) makes small."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from frpo.data.demonstrations.batch import SupervisedBatch
from frpo.foundation import require
from frpo.functional.likelihood import completion_nll
from frpo.functional.logprobs import token_full_kl
from frpo.functional.masked import masked_mean
from frpo.functional.preference import bradley_terry_nll
from frpo.tar.attacks import PairBatch

Forward = Callable[[SupervisedBatch], Tensor]
"""A model's logits [B, S - 1, V] for the tokens 1 to S - 1 of a batch."""


class TamperLoss(ABC):
    """A loss for each pair of a safe answer (``chosen``) and the one an attacker wants (``rejected``)."""

    @abstractmethod
    def __call__(self, policy: Forward, reference: Forward, pairs: PairBatch) -> Tensor:
        """Losses [B] of the (attacked) policy; ``reference`` is the policy before all training, without gradient."""


class Entropy(TamperLoss):
    """Negative entropy of the policy's next-token distribution on the rejected answers (arXiv 2408.00761, section 4.2).

    In nats, the mean over an answer's tokens, at least ``-log V``: an attacked policy should not know what comes next.
    For knowledge that should go, hazardous biology say; a policy that should refuse wants :class:`DPO`.
    """

    def __call__(self, policy: Forward, reference: Forward, pairs: PairBatch) -> Tensor:
        """See :class:`TamperLoss`."""
        logits = policy(pairs.rejected)
        # -H(p) = KL(p || uniform) - log V
        surplus = token_full_kl(logits, logits.new_zeros(1).expand_as(logits))
        return masked_mean(surplus, pairs.rejected.answer_mask[:, 1:]) - math.log(logits.shape[-1])


class DPO(TamperLoss):
    """Direct preference optimisation (arXiv 2305.18290, equation 7), the loss of the paper for refusals.

    ``-log sigmoid(beta ((log p - log q)(chosen) - (log p - log q)(rejected)))`` in nats, with p the policy and q the
    reference, of whole answers. It is log 2 where the policy is the reference.

    Args:
        beta: strength of the implied KL constraint, > 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = require.number("DPO.beta", beta, above=0)

    def __call__(self, policy: Forward, reference: Forward, pairs: PairBatch) -> Tensor:
        """See :class:`TamperLoss`."""
        gains = [
            self.beta * (answer_nlls(reference, batch).sum(-1) - answer_nlls(policy, batch).sum(-1))
            for batch in (pairs.chosen, pairs.rejected)
        ]
        return bradley_terry_nll(chosen=gains[0], rejected=gains[1], margin=gains[0].new_zeros(gains[0].shape))


class Refusal(TamperLoss):
    """Negative log-likelihood of the chosen answers in nats, the mean over an answer's tokens."""

    def __call__(self, policy: Forward, reference: Forward, pairs: PairBatch) -> Tensor:
        """See :class:`TamperLoss`."""
        return masked_mean(answer_nlls(policy, pairs.chosen), pairs.chosen.answer_mask[:, 1:])


def answer_nlls(model: Forward, batch: SupervisedBatch) -> Tensor:
    """Negative log-likelihood in nats of each answer token, [B, S - 1], 0 at the others."""
    return completion_nll(model(batch), batch.input_ids[:, 1:], batch.answer_mask[:, 1:])
