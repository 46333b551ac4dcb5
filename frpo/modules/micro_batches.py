"""Rollouts cut into micro-batches of sequences, and the forward pass over one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpo.types import RolloutBatch


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
