"""A policy-optimisation module in miniature: manual optimisation, rollouts in the step, a loader that resumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from frpo.types import Judgement, Prompt, PromptBatch, RolloutBatch, ScoredBatch, StepRecord

GROUP = 2
TOKENS = 3


def scored_batch(positions: list[int], bias: float = 0.0) -> ScoredBatch:
    """``P`` prompts of two tokens, two completions of three, rewards known from the position."""
    P = len(positions)
    prompts = PromptBatch(
        prompts=tuple(Prompt(id=f"p{i}", messages=(), task="even" if i % 2 == 0 else "odd") for i in positions),
        texts=tuple(f"prompt {i}" for i in positions),
        input_ids=torch.zeros(P, 2, dtype=torch.int64),
        mask=torch.ones(P, 2, dtype=torch.bool),
        position=torch.tensor(positions, dtype=torch.int64),
    )
    rollout = RolloutBatch(
        prompts=prompts,
        completion_ids=torch.zeros(P, GROUP, TOKENS, dtype=torch.int64),
        mask=torch.ones(P, GROUP, TOKENS, dtype=torch.bool),
        logps=torch.zeros(P, GROUP, TOKENS),
        truncated=torch.zeros(P, GROUP, dtype=torch.bool),
        texts=tuple(tuple(f"answer {i}.{g} é" for g in range(GROUP)) for i in positions),
    )
    rewards = torch.tensor([[i + g / 10 + bias for g in range(GROUP)] for i in positions], dtype=torch.float64)
    return ScoredBatch(
        rollout=rollout,
        rewards=rewards,
        reward_mask=torch.ones(P, GROUP, dtype=torch.bool),
        judgements=tuple(Judgement.of(r, {"length": 1.0}) for r in rewards.flatten().tolist()),
        weights=torch.full((P, GROUP), 0.5),
    )


class Positions:
    """Batches of running prompt numbers; its state moves on before the batch is handed out."""

    def __init__(self, batches: int, size: int = 2) -> None:
        self.batches, self.size, self.next = batches, size, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        start = self.next % self.batches
        for _ in range(start, self.batches):
            first = self.next * self.size
            self.next += 1
            yield torch.arange(first, first + self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Fixed:
    """The same validation prompts every time."""

    def __init__(self, batches: int = 2, size: int = 1) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        for b in range(self.batches):
            yield torch.arange(b * self.size, (b + 1) * self.size)


class ToyModule(LightningModule):
    """Two optimiser steps per rollout where ``updates`` is 2, so ``global_step`` runs ahead of the batches."""

    sampler = None  # a module that draws completions has one

    def __init__(self, batches: int = 4, updates: int = 1, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer_weight = torch.nn.Parameter(torch.zeros(3))
        self.batches, self.updates, self.fail_at = batches, updates, fail_at
        self.last_step: StepRecord | None = None
        self.seen: list[int] = []

    def _record(self, batch: Tensor, stage: str) -> ScoredBatch:
        scored = scored_batch(batch.tolist())
        self.last_step = StepRecord(step=self.global_step, stage=stage, scored=scored)
        return scored

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.fail_at is not None and self.global_step >= self.fail_at:
            raise RuntimeError("planted failure")
        self.seen += batch.tolist()
        scored = self._record(batch, "train")
        optimizer = self.optimizers()
        for _ in range(self.updates):
            optimizer.zero_grad()
            self.manual_backward((self.layer_weight - scored.rewards.mean().float()).pow(2).sum())
            optimizer.step()
        self.log("train/reward", scored.rewards.mean().float(), prog_bar=True)
        self.log("train/kl", self.layer_weight.detach().sum())
        self.log("train/loss", 0.25)
        self.log("train/ess", 1.5)
        self.log("train/seconds_rollout", 0.5)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/reward", self._record(batch, "val").rewards.mean().float(), batch_size=len(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/reward", self._record(batch, "test").rewards.mean().float(), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Positions:
        return Positions(self.batches)

    def val_dataloader(self) -> Fixed:
        return Fixed()

    def test_dataloader(self) -> Fixed:
        return Fixed(batches=3)
