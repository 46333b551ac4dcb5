"""The KL term: which estimator is differentiated, which is logged, and what beta means."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from frpo.foundation import require
from frpo.functional.kl import SAMPLED
from frpo.functional.logprobs import token_full_kl
from frpo.schedules import Constant, Schedule

KLEstimator = Literal["k1", "k2", "k3", "full"]
BetaScale = Literal["loss", "objective"]


class KLPenalty:
    """``beta * mean_i (1/T_i) sum_t kl_it`` against the reference.

    Args:
        beta: >= 0, a number or a schedule.
        estimator: differentiated in the loss: k1, k2, k3, or full (exact over the vocabulary: the right gradient and
            the lowest variance, for one more set of logits in memory). k1 has a gradient of mean zero and k3 that of
            the reversed KL; k3 is what the published runs use.
        logged: the estimator that training logs, and that an adaptive beta steers by; validation always measures
            ``full``.
        beta_scale: ``loss`` adds beta to the loss as the released trainer does. For lambda < 1 that loss is 1/lambda
            times the objective in units of reward, so a fixed beta weakens the constraint by 1/lambda; ``objective``
            takes beta in units of reward and multiplies it by max(lambda, 1)/lambda. Compare methods at one
            ``objective`` beta.
    """

    def __init__(
        self,
        beta: float | Schedule = 0.001,
        estimator: KLEstimator = "k3",
        logged: KLEstimator = "k3",
        beta_scale: BetaScale = "loss",
    ) -> None:
        self.estimator = require.one_of("KLPenalty.estimator", estimator, KLEstimator)
        self.logged = require.one_of("KLPenalty.logged", logged, KLEstimator)
        self.beta_scale = require.one_of("KLPenalty.beta_scale", beta_scale, BetaScale)
        self.beta = beta if isinstance(beta, Schedule) else Constant(beta)
        hint = "a negative beta rewards drifting from the reference; write 0 to train without a KL term"
        require.number("KLPenalty.beta", self.beta.lower_bound(), at_least=0, hint=hint)

    def coefficient(self, step: int, lam: float | None) -> float:
        """What multiplies the KL in the loss at ``step``; ``lam`` is None for an objective without lambda.

        >>> [KLPenalty(beta=0.05, beta_scale=scale).coefficient(0, lam=0.5) for scale in ("loss", "objective")]
        [0.05, 0.1]
        """
        beta = self.beta.value(step)
        return beta * max(lam, 1.0) / lam if self.beta_scale == "objective" and lam is not None else beta

    @property
    def is_off(self) -> bool:
        """Whether beta is 0 at every step."""
        return isinstance(self.beta, Constant) and self.beta.value(0) == 0

    def tokens(
        self,
        estimator: KLEstimator,
        *,
        logps: Tensor,
        ref_logps: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        temperature: float,
    ) -> Tensor:
        """KL of each token [b, T] from log-probabilities [b, T] and logits [b, T, V] of policy and reference."""
        if estimator == "full":
            return token_full_kl(logits, ref_logits, temperature=temperature)
        return SAMPLED[estimator](logps, ref_logps)
