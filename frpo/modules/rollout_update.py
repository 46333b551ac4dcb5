"""A rollout's update: the exact gradient of the loss on its groups, a few sequences at a time.

The loss of a batch depends on the policy through one number per sequence, the clipped ratio a_i, and not linearly. Its
gradient is sum_i (dL/da_i) grad a_i all the same: with the coefficients dL/da_i of the whole batch known, each
micro-batch adds its own terms, and the sum does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frpo.functional.masked import masked_mean
from frpo.modules.micro_batches import MicroBatch, TokenPass, micro_batches
from frpo.modules.numerics import check_coefficients, check_loss
from frpo.modules.sam import SAM
from frpo.objectives import Objective
from frpo.types import ScoredBatch

Backward = Callable[[Tensor, bool], None]
"""Takes the loss of a micro-batch, and whether it is the last before the gradient is whole."""


@dataclass(frozen=True)
class Pass:
    """Of one gradient: ``coefficients`` dL/da_i [P, G]; of its tokens ``logps`` and the logged ``kl``, [P, G, T]."""

    coefficients: Tensor
    logps: Tensor
    kl: Tensor


class RolloutUpdate:
    """The gradients of the optimiser steps that are taken on one rollout.

    In the first of its ``passes``, one per step, the policy is the one that drew the rollout, and every ratio is 1.
    Once the weights have moved, ratios are taken to the log-probabilities of that pass. ``sam_norms`` are the norms of
    each gradient before and after the ascent.

    Args:
        scored: the rollout and its rewards.
        objective: gives the coefficients of its groups.
        token_pass: runs policy and reference over a micro-batch.
        backward: accumulates the gradient of a micro-batch's loss.
        beta: coefficient of the KL term.
        num_groups: groups with at least 2 rewards, the mean over ranks.
        micro_batch_size: sequences in one pass; memory only.
        sam: moves each gradient to the worst weights nearby; None takes it where the policy is.
    """

    def __init__(
        self,
        scored: ScoredBatch,
        objective: Objective,
        token_pass: TokenPass,
        backward: Backward,
        *,
        beta: float,
        num_groups: Tensor,
        micro_batch_size: int,
        sam: SAM | None = None,
    ) -> None:
        self.scored, self.objective, self.token_pass, self.backward = scored, objective, token_pass, backward
        self.beta, self.num_groups, self.sam = beta, num_groups, sam
        self.batches = list(micro_batches(scored.rollout, micro_batch_size))
        self.upper = objective.upper_side(scored.rewards, scored.reward_mask)
        self.passes: list[Pass] = []
        self.sam_norms: list[tuple[Tensor, Tensor]] = []

    def gradient(self) -> None:
        """Add the gradient of the next optimiser step to the policy's."""
        self.passes.append(self._accumulate())
        if self.sam is not None:
            self.sam_norms.append(self.sam.move_gradient(self.token_pass.policy, self._accumulate))

    def _accumulate(self) -> Pass:
        """Add the gradient at the present weights: coefficients first, then micro-batch after micro-batch."""
        rewards, members = self.scored.rewards, self.scored.reward_mask
        ratios = self._ratios() if self.passes else None
        coefficients = self.objective.coefficients(rewards, members, ratios, self.num_groups)
        check_coefficients(coefficients, rewards, [prompt.id for prompt in self.scored.rollout.prompts.prompts])
        return Pass(coefficients, *self._backward(coefficients))

    def _ratios(self) -> Tensor:
        """Off-policy, first pass: a_i of every sequence under the present weights, [P, G], without a graph."""
        a = self.passes[0].logps.new_ones(self.scored.rewards.numel())
        with torch.no_grad():
            for batch in self.batches:
                a[batch.rows] = self._batch_ratios(self.token_pass(batch, with_reference=False).logps, batch)
        return a.view_as(self.scored.rewards)

    def _backward(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """The backward of ``sum_i dL/da_i a_i + beta mean_i (1/T_i) sum_t kl_it``.

        Every completion counts in the KL, judged or not. Returns log-probabilities and logged KL of the tokens,
        [P, G, T] each, 0 where masked.
        """
        rollout = self.scored.rollout
        P, G, T = rollout.mask.shape
        logps = kl = torch.zeros(0)
        for i, batch in enumerate(self.batches):
            tokens = self.token_pass(batch, with_reference=True)
            a = self._batch_ratios(tokens.logps, batch)
            loss = (coefficients.flatten()[batch.rows].to(a.dtype) * a).sum()
            if self.beta:
                loss = loss + self.beta * masked_mean(tokens.kl, batch.mask).sum() / (P * G)
            check_loss(loss, "prompt", (rollout.prompts.prompts[row // G].id for row in batch.rows.tolist()))
            self.backward(loss, i == len(self.batches) - 1)
            if i == 0:
                logps, kl = (tokens.logps.new_zeros(P * G, T) for _ in range(2))
            width = batch.mask.shape[-1]
            logps[batch.rows, :width] = torch.where(batch.mask, tokens.logps.detach(), 0)
            kl[batch.rows, :width] = torch.where(batch.mask, tokens.kl_logged, 0)
        return logps.view(P, G, T), kl.view(P, G, T)

    def _batch_ratios(self, logps: Tensor, batch: MicroBatch) -> Tensor:
        old = self.passes[0].logps.flatten(0, 1)[batch.rows, : batch.mask.shape[-1]] if self.passes else None
        side = None if self.upper is None else self.upper.flatten()[batch.rows]
        return self.objective.ratios(logps, batch.mask, old_logps=old, upper=side)
