"""Rollouts cut into micro-batches of sequences, and the passes of policy and reference over one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpo.functional.logprobs import token_logprobs
from frpo.models.reference import Reference
from frpo.models.sharding import unwrapped
from frpo.penalty import KLPenalty
from frpo.rollouts.sampler import Sampler
from frpo.types import RolloutBatch

FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


@dataclass(frozen=True)
class MicroBatch:
    """``b`` sequences, each a prompt (padded on the left to L) and its completion (padded on the right to T).

    Shapes: ``rows`` int64 [b], the sequence's place among the P*G of the rollout; ``input_ids``, ``attention_mask`` and
    ``position_ids`` int64 [b, L + T]; ``completion_ids`` int64 and ``mask`` bool [b, T]. L and T are the longest of the
    micro-batch, so short sequences do not pay for long ones elsewhere.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor
    mask: Tensor


def micro_batches(rollout: RolloutBatch, size: int) -> Iterator[MicroBatch]:
    """Cut the P*G sequences of ``rollout`` into ``ceil(P*G / size)`` micro-batches, longest sequences first."""
    G = rollout.completion_ids.shape[1]
    prompt_ids, prompt_mask = (x.repeat_interleave(G, 0) for x in (rollout.prompts.input_ids, rollout.prompts.mask))
    completion_ids, mask = rollout.completion_ids.flatten(0, 1), rollout.mask.flatten(0, 1)
    order = (prompt_mask.sum(-1) + mask.sum(-1)).argsort(descending=True, stable=True)
    for rows in order.split(size):
        L, T = (max(1, int(x[rows].sum(-1).max())) for x in (prompt_mask, mask))
        attention = torch.cat([prompt_mask[rows, -L:], mask[rows, :T]], -1).long()
        yield MicroBatch(
            rows=rows,
            input_ids=torch.cat([prompt_ids[rows, -L:], completion_ids[rows, :T]], -1),
            attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
            completion_ids=completion_ids[rows, :T],
            mask=mask[rows, :T],
        )


def completion_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Logits that predict each completion token: [b, T, V]; prompt positions are not projected on the vocabulary."""
    T = batch.completion_ids.shape[-1]
    out = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=T + 1,
    )
    return out.logits[:, -T - 1 : -1]


def check_forward(model: Any) -> None:
    """Refuse a model that cannot be told positions, or which logits are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else unwrapped(model)
    missing = [name for name in FORWARD_ARGUMENTS if name not in inspect.signature(base.forward).parameters]
    if missing:
        raise ValueError(
            f"{type(base).__name__}.forward takes no {' and no '.join(missing)}, which training on left-padded prompts "
            "needs; choose a decoder-only model of current transformers"
        )


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
