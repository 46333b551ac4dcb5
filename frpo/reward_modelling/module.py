"""Training a reward model: a sequence classifier on preference pairs, labels or values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from frpo.data.preferences.batch import EncodedExample, JudgedBatch
from frpo.foundation import require
from frpo.models.scorer import Scorer, classifier_logits, save_scorer
from frpo.modules.averages import Averages
from frpo.modules.policy_module import PolicyModule
from frpo.modules.precision import float32_by_default
from frpo.modules.strategy import check_precision, check_unsharded
from frpo.reward_modelling.losses import RewardLoss
from frpo.schedules import Schedule
from frpo.types import Stage

NAMES = ("loss", "accuracy", "score", "margin", "grad_norm", "lr")
SHOWN = ("loss", "accuracy")


class RewardModelling(PolicyModule):
    """Trains a scorer on judged responses; which loss is the configuration's.

    Conversations are encoded and scored by the code that :class:`~frpo.rewards.model.RewardModel` scores with. One
    training step is one optimiser step on the mean loss of a batch; ``micro_batch_size`` has no influence on it.

    Metrics (``train/``, ``val/``, ``test/``): ``loss`` and, where the loss decides anything, ``accuracy``, over
    examples; ``score`` over responses; ``margin``, chosen minus rejected, over pairs; in evaluation ``auroc`` over
    responses.

    Args:
        scorer: the model that trains.
        loss: :class:`~frpo.reward_modelling.losses.BradleyTerry`, ``Binary`` or ``Regression``.
        save_dir: directory for the trained reward model, written when training ends; null writes none.
        micro_batch_size: examples in one forward and backward pass; memory only.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by optimiser step; null leaves it constant.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        seed: of a fresh head and adapter, the only thing that is random here.
    """

    shown = SHOWN

    def __init__(
        self,
        scorer: Scorer,
        loss: RewardLoss,
        save_dir: str | None = None,
        micro_batch_size: int = 8,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(scorer.base, optimizer, lr_schedule, max_grad_norm, seed)
        self.scorer, self.loss, self.save_dir = scorer, loss, save_dir
        self.micro_batch_size = require.number("RewardModelling.micro_batch_size", micro_batch_size, at_least=1)

    # Construction

    def setup(self, stage: str) -> None:
        """Refuse sharded weights; build the metrics."""
        super().setup(stage)
        check_unsharded(self.trainer, "RewardModelling writes a reward model from whole weights")
        self.train_averages, self.eval_averages = Averages(NAMES), Averages(NAMES)
        self.auroc = BinaryAUROC()

    def load_models(self) -> None:
        """Load the classifier, which stands in the place of a policy."""
        self.policy_model = self.scorer.load()

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        check_precision(self.trainer)

    # Training

    def scores(self, rows: Sequence[EncodedExample]) -> Tensor:
        """Scores [N, K] of the responses of ``N`` examples, differentiable, float32 or wider."""
        flat = [ids for row in rows for ids in row.ids]
        return classifier_logits(self.policy_model, flat)[:, 0].view(len(rows), self.loss.responses)

    @float32_by_default()
    def training_step(self, batch: JudgedBatch, batch_idx: int) -> None:
        """One optimiser step on the mean loss of the batch."""
        step = self.global_step
        starts = range(0, len(batch), self.micro_batch_size)
        for start in starts:
            part = slice(start, start + self.micro_batch_size)
            scores, targets = self.scores(batch.rows[part]), batch.targets[part]
            losses = self.loss(scores, targets)
            _check_loss(losses, batch.rows[part])
            self._record(self.train_averages, scores.detach(), targets, losses.detach())
            self._backward(losses.sum() / len(batch), start == starts[-1])
        self._optimizer_step()
        self._log_training(step)

    def _record(self, averages: Averages, scores: Tensor, targets: Tensor, losses: Tensor) -> None:
        averages.update("loss", losses)
        averages.update("score", scores)
        correct = self.loss.correct(scores, targets)
        if correct is not None:
            averages.update("accuracy", correct)
        if scores.shape[1] == 2:
            averages.update("margin", scores[:, 0] - scores[:, 1])

    def on_fit_end(self) -> None:
        """Write the reward model."""
        if self.save_dir is not None and self.global_rank == 0:
            save_scorer(self.policy_model, self.tokenizer, self.save_dir)

    # Validation and test

    def on_validation_start(self) -> None:
        """Start the averages afresh."""
        self.eval_averages.reset()
        self.auroc.reset()

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    @float32_by_default()
    def validation_step(self, batch: JudgedBatch, batch_idx: int) -> None:
        """Score held-out examples."""
        for start in range(0, len(batch), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            scores, targets = self.scores(batch.rows[part]), batch.targets[part]
            self._record(self.eval_averages, scores, targets, self.loss(scores, targets))
            labelled = self.loss.labelled(scores, targets)
            if labelled is not None:
                self.auroc.update(labelled[0].double(), labelled[1])  # a float32 sigmoid would tie scores beyond 17

    def test_step(self, batch: JudgedBatch, batch_idx: int) -> None:
        """As validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the averages over all held-out examples and ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Stage, prog_bar: bool = False) -> None:
        super()._log_evaluation(stage, prog_bar)
        if self.auroc.update_called:
            self.log(f"{stage}/auroc", self.auroc.compute(), rank_zero_only=True)


def _check_loss(losses: Tensor, rows: Sequence[EncodedExample]) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(rows[i].prompt.id for i in bad)
        raise FloatingPointError(
            f"the loss of example(s) {named} is not finite; the weights were not changed. Lower the learning rate, or "
            "use precision bf16-mixed or 32-true"
        )
