"""Supervised fine-tuning: the policy imitates answers. The downstream step after which a trained policy is measured."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from frpo.data.demonstrations.batch import SupervisedBatch
from frpo.foundation import require
from frpo.functional.likelihood import completion_nll
from frpo.models.policy import Policy
from frpo.models.sharding import gathered
from frpo.modules import packing
from frpo.modules.averages import Averages
from frpo.modules.micro_batches import check_forward
from frpo.modules.numerics import check_loss
from frpo.modules.policy_module import PolicyModule
from frpo.modules.precision import float32_by_default
from frpo.modules.strategy import check_precision, check_unsharded
from frpo.schedules import Schedule

NAMES = ("loss", "tokens", "grad_norm", "lr", "seconds_update")


class SupervisedFineTuning(PolicyModule):
    """Maximum likelihood of the answers of demonstrations.

    The loss of an optimiser step is the negative log-likelihood of its answer tokens, summed over the step's batch on
    all ranks and divided by their number: every token counts the same, and neither ``micro_batch_size``, packing nor
    the number of ranks has an influence (but for the noise of an adapter's dropout).

    Args:
        policy: the model that trains; its adapter may have dropout.
        micro_batch_size: sequences in one forward and backward pass, packed rows with ``packing``; memory only.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by optimiser step; null leaves it constant.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        seed: of a fresh adapter and of dropout.
    """

    def __init__(
        self,
        policy: Policy,
        micro_batch_size: int = 8,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, lr_schedule, max_grad_norm, seed)
        self.micro_batch_size = require.number("SupervisedFineTuning.micro_batch_size", micro_batch_size, at_least=1)

    def setup(self, stage: str) -> None:
        """Build the metrics."""
        super().setup(stage)
        self.train_averages, self.eval_averages = Averages(NAMES), Averages(["loss"])

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        check_precision(self.trainer)
        check_forward(self.policy_model)
        if self.positions is not None and self.facts.max_tokens > self.positions:
            raise ValueError(
                f"a demonstration has {self.facts.max_tokens} tokens, but {self.policy.path!r} has positions for "
                f"{self.positions}; write data.init_args.max_length: {self.positions} or less"
            )
        if self.facts.packed:
            check_unsharded(
                self.trainer,
                "packing gives ranks different numbers of rows, and a pass of sharded weights needs every rank; write "
                "data.init_args.packing: false",
            )
            packing.check_attention(self.policy_model)

    def on_train_start(self) -> None:
        """Check on the model, now on its device, that packed demonstrations stay apart."""
        if self.facts.packed:
            with self.trainer.precision_plugin.forward_context():
                packing.check_apart(self.policy_model)

    @float32_by_default()
    def training_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Take one optimiser step on a batch."""
        step = self.global_step
        with self._phase("update"):
            # DDP averages gradients over ranks, so the sum over all tokens is divided by their mean number per rank.
            tokens = self._mean_over_ranks(torch.tensor(batch.tokens, dtype=torch.float64))
            parts = list(batch.split(self.micro_batch_size))
            for i, part in enumerate(parts):
                nll = answer_nll(self.policy_model, part)
                loss = nll.sum() / tokens
                check_loss(loss, "demonstration", part.ids)
                self._backward(loss, i == len(parts) - 1)
                self.train_averages.update("loss", nll, part.answer_mask)
            self.train_averages.update("tokens", tokens * self.trainer.world_size)
            self._optimizer_step()
        self._log_training(step)

    @float32_by_default()
    def validation_step(self, batch: SupervisedBatch, batch_idx: int) -> None:
        """Measure the loss of held-out demonstrations."""
        with gathered(self.policy_model):
            for part in batch.split(self.micro_batch_size):
                self.eval_averages.update("loss", answer_nll(self.policy_model, part), part.answer_mask)

    def on_validation_start(self) -> None:
        """Start the averages afresh."""
        self.eval_averages.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the loss in nats per token over all held-out demonstrations and ranks."""
        self._log_evaluation("val", prog_bar=True)


def answer_nll(model: Any, batch: SupervisedBatch) -> Tensor:
    """Negative log-likelihood in nats of every token to imitate, [B, S], 0 at the others.

    Positions before the first of them are not projected on the vocabulary. A packed batch is given without a mask: the
    model then attends within each run of positions alone.
    """
    S = batch.input_ids.shape[-1]
    first = int(batch.answer_mask.any(0).int().argmax())
    assert first > 0, "a prompt has at least one token"
    out = model(
        input_ids=batch.input_ids,
        attention_mask=None if batch.packed else batch.mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=S - first + 1,
    )
    nll = completion_nll(out.logits[:, :-1], batch.input_ids[:, first:], batch.answer_mask[:, first:])
    return torch.nn.functional.pad(nll, (first, 0))
