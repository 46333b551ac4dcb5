"""The records of the walk: what moves to a device, and what stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frpo.types import Batch, Prompt, PromptBatch


@dataclass(frozen=True)
class Two(Batch):
    name: str
    parts: tuple[PromptBatch, ...]
    weights: Tensor


def prompts(count: int) -> PromptBatch:
    prompt = Prompt("7", ({"role": "user", "content": "Hi"},), "normal")
    mask = torch.ones(count, 3, dtype=torch.bool)
    return PromptBatch((prompt,) * count, ("Hi",) * count, torch.ones(count, 3), mask, torch.arange(count))


def test_a_batch_moves_with_all_its_tensors() -> None:
    """Those of the batches in it too; the record that was moved stays where it is."""
    batch = Two("two", (prompts(1), prompts(2)), torch.ones(2))
    moved = batch.to("meta")
    assert type(moved) is Two
    assert moved.weights.is_meta
    for part in moved.parts:
        assert part.input_ids.is_meta
        assert part.mask.is_meta
        assert part.position.is_meta
    assert (moved.name, moved.parts[1].texts, len(moved.parts[1])) == ("two", ("Hi", "Hi"), 2)
    assert not batch.parts[0].mask.is_meta
