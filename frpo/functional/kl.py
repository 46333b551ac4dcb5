"""Estimators of KL(policy || reference) per token.

k1, k2 and k3 (Schulman 2020, "Approximating KL divergence") need only the log-probabilities of the sampled tokens; the
full KL needs the logits of the whole vocabulary. Write x = ref_logp - logp, with tokens drawn from the policy. Then
E[k1] = E[k3] = KL, and k2 is biased by terms of third order. As *losses* they behave differently: the gradient of k2
is an unbiased gradient of the KL, the gradient of k1 has expectation zero, and the gradient of k3 is that of
KL(reference || policy).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Beyond x = 20 k3 is exp(20) = 5e8 already; the clamp keeps float32 and its gradient finite.
LOG_RATIO_LIMIT = 20.0


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``-x``: unbiased, high variance, may be negative. Shapes [...], [...] -> [...].

    >>> k1(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0]))
    tensor([ 1., -2.])
    """
    return -_x(logps, ref_logps)


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``x^2 / 2``: biased, low variance. Shapes [...], [...] -> [...].

    >>> k2(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0]))
    tensor([0.5000, 2.0000])
    """
    return _x(logps, ref_logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``exp(x) - x - 1``: unbiased, never negative, 0 where the two agree. Shapes [...], [...] -> [...].

    The KL term of the released trainer of arXiv 2602.08813.

    >>> k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    x = _x(logps, ref_logps).clamp(max=LOG_RATIO_LIMIT)
    return x.expm1() - x


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact per-token KL ``sum_v pi_v (log pi_v - log ref_v)``: [..., V], [..., V] -> [...].

    A token that the policy gives no mass (logit -inf) adds nothing.

    >>> full_kl(torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0]))  # a sure token against a fair coin: log 2
    tensor(0.6931)
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"full_kl: got logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)}, expected one shape"
        )
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    gap = torch.where(logp == -torch.inf, 0, logp - ref_logp)
    return (logp.exp() * gap).sum(-1)


SAMPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def _x(logps: Tensor, ref_logps: Tensor) -> Tensor:
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"KL estimator: got logps {tuple(logps.shape)} and ref_logps {tuple(ref_logps.shape)}, expected one shape"
        )
    return ref_logps - logps
