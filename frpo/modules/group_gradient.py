"""The exact gradient of a loss on groups, a few sequences at a time.

The loss of a batch depends on the policy through one number a sequence, the clipped ratio a_i, and not linearly. Its
gradient is sum_i (dL/da_i) grad a_i all the same: with the coefficients dL/da_i of the whole batch known, each
micro-batch adds its own terms, and the sum does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpo.functional.logprobs import token_logprobs
from frpo.functional.masked import masked_mean
from frpo.models.reference import Reference
from frpo.modules import checks
from frpo.modules.micro_batches import MicroBatch, completion_logits, micro_batches
from frpo.objectives import Objective
from frpo.penalty import KLPenalty
from frpo.rollouts.sampler import Sampler
from frpo.types import RolloutBatch

Backward = Callable[[Tensor, bool], None]
"""Takes the loss of a micro-batch, and whether it is the last of the optimiser step."""


@dataclass(frozen=True)
class Tokens:
    """Of one micro-batch, [b, T] each: ``logps`` under the sampling distribution, and the KL to the reference."""

    logps: Tensor
    kl: Tensor
    kl_logged: Tensor


@dataclass(frozen=True)
class TokenPass:
    """Runs the policy over a micro-batch, and the reference without gradient.

    The KL is that of the whole distributions at the sampling temperature, also where sampling cuts them.
    """

    policy: Any
    reference: Reference | None
    frozen: Any
    sampler: Sampler
    kl: KLPenalty

    def __call__(self, batch: MicroBatch, *, with_reference: bool) -> Tokens:
        """Token quantities of ``batch``; the KL is 0 without a reference."""
        sampler, ids = self.sampler, batch.completion_ids
        ref_logits = self._reference_logits(batch) if with_reference else None
        logits = completion_logits(self.policy, batch)
        logps = full = token_logprobs(logits, ids, temperature=sampler.temperature)
        if sampler.truncates:
            logps = token_logprobs(
                logits, ids, temperature=sampler.temperature, top_k=sampler.top_k, top_p=sampler.top_p
            )
        if ref_logits is None:
            return Tokens(logps, torch.zeros_like(full), torch.zeros_like(full))
        ref_logps = token_logprobs(ref_logits, ids, temperature=sampler.temperature)

        def kl(estimator: Any) -> Tensor:
            return self.kl.tokens(
                estimator,
                logps=full,
                ref_logps=ref_logps,
                logits=logits,
                ref_logits=ref_logits,
                temperature=sampler.temperature,
            )

        differentiated = kl(self.kl.estimator)
        if self.kl.logged == self.kl.estimator:
            return Tokens(logps, differentiated, differentiated.detach())
        with torch.no_grad():
            return Tokens(logps, differentiated, kl(self.kl.logged))

    def _reference_logits(self, batch: MicroBatch) -> Tensor | None:
        """To be run before the policy: FSDP1 recomputes activations with the weights of the latest pass."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.reference.active(self.policy, self.frozen) as model:
            return completion_logits(model, batch)


@dataclass(frozen=True)
class GroupGradient:
    """Accumulates the gradient of ``objective`` plus the KL term over micro-batches of ``micro_batch_size``."""

    objective: Objective
    token_pass: TokenPass
    micro_batch_size: int

    def ratios(self, rollout: RolloutBatch, old_logps: Tensor, upper: Tensor | None) -> Tensor:
        """Off-policy, first pass: a_i of every sequence under the present weights, [P, G], without a graph."""
        P, G, _ = rollout.mask.shape
        a = old_logps.new_ones(P * G)
        with torch.no_grad():
            for batch in micro_batches(rollout, self.micro_batch_size):
                logps = self.token_pass(batch, with_reference=False).logps
                a[batch.rows] = self._batch_ratios(logps, batch, old_logps, upper)
        return a.view(P, G)

    def backward(
        self,
        rollout: RolloutBatch,
        backward: Backward,
        *,
        coefficients: Tensor,
        beta: float,
        old_logps: Tensor | None,
        upper: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The backward of ``sum_i dL/da_i a_i + beta mean_i (1/T_i) sum_t kl_it``.

        ``coefficients`` [P, G] are dL/da_i; ``old_logps`` [P, G, T] is None on-policy; ``upper`` [P, G] as in
        :meth:`~frpo.objectives.Objective.upper_side`. Every completion counts in the KL, judged or not. Returns
        log-probabilities and logged KL of the tokens, [P, G, T] each, 0 where masked.
        """
        P, G, T = rollout.mask.shape
        logps = kl = torch.zeros(0)
        batches = list(micro_batches(rollout, self.micro_batch_size))
        for i, batch in enumerate(batches):
            tokens = self.token_pass(batch, with_reference=True)
            a = self._batch_ratios(tokens.logps, batch, old_logps, upper)
            loss = (coefficients.flatten()[batch.rows].to(a.dtype) * a).sum()
            if beta:
                loss = loss + beta * masked_mean(tokens.kl, batch.mask).sum() / (P * G)
            checks.check_loss(loss, rollout, batch.rows)
            backward(loss, i == len(batches) - 1)
            if i == 0:
                logps, kl = (tokens.logps.new_zeros(P * G, T) for _ in range(2))
            width = batch.mask.shape[-1]
            logps[batch.rows, :width] = torch.where(batch.mask, tokens.logps.detach(), 0)
            kl[batch.rows, :width] = torch.where(batch.mask, tokens.kl_logged, 0)
        return logps.view(P, G, T), kl.view(P, G, T)

    def _batch_ratios(self, logps: Tensor, batch: MicroBatch, old_logps: Tensor | None, upper: Tensor | None) -> Tensor:
        old = None if old_logps is None else old_logps.flatten(0, 1)[batch.rows, : batch.mask.shape[-1]]
        side = None if upper is None else upper.flatten()[batch.rows]
        return self.objective.ratios(logps, batch.mask, old_logps=old, upper=side)
