"""Tamper resistance: safeguards that are meant to outlast fine-tuning, trained against simulated attacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from frpo.data.demonstrations.batch import SupervisedBatch
from frpo.foundation import require
from frpo.functional.likelihood import completion_nll
from frpo.models.policy import Policy
from frpo.models.reference import Reference
from frpo.models.sharding import gathered, total_norm
from frpo.modules.averages import Averages
from frpo.modules.micro_batches import check_forward
from frpo.modules.numerics import check_loss
from frpo.modules.policy_module import PolicyModule
from frpo.modules.precision import float32_by_default
from frpo.modules.strategy import check_precision
from frpo.modules.supervised import answer_nll
from frpo.schedules import Schedule
from frpo.tar.attacks import AttackBatch, PairBatch, TamperBatch
from frpo.tar.losses import TamperLoss

NAMES = (
    "loss", "tamper_first", "tamper_last", "tamper_norm", "attack_nll_first", "attack_nll_last",
    "retain_nll", "retain_distance", "grad_norm", "lr", "seconds_attack", "seconds_retain",
)  # fmt: skip


class TamperResistance(PolicyModule):
    """TAR, tamper-resistant safeguards (arXiv 2408.00761, algorithm 1), to first order.

    An outer step starts at weights w. Each of its attacks fine-tunes them for K steps as an attacker would, and after
    every ``measure_every``-th of these and after the last the gradient of ``loss`` is taken at the attacked weights.
    The mean of these gradients, at the attacked weights and with respect to them, is added times ``lambda_tr`` to the
    gradient at w of what is to be kept::

        lambda_retain (NLL of the answers to keep + lambda_distance ||h_w - h_0||^2)

    with h the hidden states of all layers and h_0 those of ``reference``, the policy before all training: squared
    Euclidean distance, the mean over layers and tokens. (The paper's equation; its released code has the distance
    without the square.) How w moves the end of an attack is left out (first order), as in the paper. So is the
    paper's initial safeguard, random mapping: give a policy that already refuses.

    Args:
        policy: the model that trains.
        loss: what an attacked policy should still do.
        reference: the policy before all training.
        lambda_tr: weight of the tamper-resistance gradient.
        lambda_retain: weight of what is to be kept.
        lambda_distance: weight in it of the hidden states' distance.
        measure_every: steps of an attack between two measurements; at or beyond K the last step alone is measured.
        attack_optimizer: of the attacker; its learning rate is the attack's.
        micro_batch_size: sequences (or pairs) in one forward and backward pass; memory only.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by outer step; null leaves it constant.
        max_grad_norm: the gradient of an outer step is clipped to this norm; null does not clip.
        seed: of a fresh adapter.
    """

    def __init__(
        self,
        policy: Policy,
        loss: TamperLoss,
        reference: Reference,
        lambda_tr: float = 1.0,
        lambda_retain: float = 1.0,
        lambda_distance: float = 1.0,
        measure_every: int = 1,
        attack_optimizer: OptimizerCallable = torch.optim.AdamW,
        micro_batch_size: int = 8,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, lr_schedule, max_grad_norm, seed)
        self.loss, self.reference, self.attack_optimizer = loss, reference, attack_optimizer
        self.lambda_tr = require.number(
            "TamperResistance.lambda_tr",
            lambda_tr,
            above=0,
            hint="0 resists no tampering; to fine-tune alone use SupervisedFineTuning",
        )
        self.lambda_retain = require.number("TamperResistance.lambda_retain", lambda_retain, at_least=0)
        self.lambda_distance = require.number("TamperResistance.lambda_distance", lambda_distance, at_least=0)
        self.measure_every = require.number("TamperResistance.measure_every", measure_every, at_least=1)
        self.micro_batch_size = require.number("TamperResistance.micro_batch_size", micro_batch_size, at_least=1)

    def load_models(self) -> None:
        """Load policy and reference."""
        super().load_models()
        self.reference_model = self.reference.load(self.policy, self.policy_model)

    def setup(self, stage: str) -> None:
        """Build the metrics."""
        super().setup(stage)
        self.train_averages, self.eval_averages = Averages(NAMES), Averages(["tamper"])

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        check_precision(self.trainer)
        check_forward(self.policy_model)

    # Training

    @float32_by_default()
    def training_step(self, batch: TamperBatch, batch_idx: int) -> None:
        """Take one outer step."""
        step = self.global_step
        with self._phase("attack"):
            tamper, held = self._tamper_gradient(batch.attacks)
        with self._phase("retain"):
            retain = self._retain_backward(batch.retain)
            for p, gradient in zip(self._trainable(), held, strict=True):
                p.grad = gradient if p.grad is None else p.grad + gradient
            self.train_averages.update("loss", self.lambda_tr * tamper + self.lambda_retain * retain)
            self._optimizer_step()
        self._log_training(step)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.policy_model.parameters() if p.requires_grad]

    def _tamper_gradient(self, attacks: tuple[AttackBatch, ...]) -> tuple[Tensor, list[Tensor]]:
        """The measured losses' mean, and ``lambda_tr`` times its gradient.

        The weights are afterwards what they were, bit for bit, and without gradient.
        """
        parameters = self._trainable()
        start = [p.detach().clone() for p in parameters]
        held = [torch.zeros_like(p) for p in parameters]
        means = []
        for attack in attacks:
            try:
                means.append(self._attack(attack, parameters, held, self.lambda_tr / len(attacks)))
            finally:
                with torch.no_grad():
                    for p, value in zip(parameters, start, strict=True):
                        p.copy_(value)
                        p.grad = None
        self.train_averages.update("tamper_norm", total_norm(self.policy_model, held))
        return torch.stack(means).mean(), held

    def _attack(self, attack: AttackBatch, parameters: list[nn.Parameter], held: list[Tensor], weight: float) -> Tensor:
        """Fine-tune as the attacker would, and measure on the way: losses [M, B].

        Adds ``weight`` times the gradient of their mean, each at the weights where it was measured, to ``held``.
        """
        attacker = self.attack_optimizer(parameters)
        for group in attacker.param_groups:
            group["lr"] = attack.learning_rate
        K = len(attack.batches)
        assert K >= 1, "Attack.steps are at least 1"
        measured = [k for k in range(1, K + 1) if k % self.measure_every == 0 or k == K]
        nlls, losses = [], []
        for k, batch in enumerate(attack.batches, 1):
            attacker.zero_grad()
            nlls.append(self._nll_backward(batch))
            attacker.step()
            if k in measured:
                attacker.zero_grad()
                losses.append(self._tamper_backward(attack.pairs))
                for total, p in zip(held, parameters, strict=True):
                    if p.grad is not None:
                        total.add_(p.grad, alpha=weight / len(measured))
        for name, values in (("attack_nll", nlls), ("tamper", losses)):
            self.train_averages.update(f"{name}_first", values[0])
            self.train_averages.update(f"{name}_last", values[-1])
        return torch.stack(losses).mean()

    def _nll_backward(self, batch: SupervisedBatch) -> Tensor:
        """The backward of the NLL an answer token, over all ranks; return this rank's, in nats."""
        tokens = self._mean_over_ranks(torch.tensor(batch.tokens, dtype=torch.float64))
        parts, seen = list(batch.split(self.micro_batch_size)), []
        for i, part in enumerate(parts):
            nll = answer_nll(self.policy_model, part).sum()
            check_loss(nll, "demonstration", part.ids)
            self._backward(nll / tokens, i == len(parts) - 1)
            seen.append(nll.detach())
        return torch.stack(seen).sum() / batch.tokens

    def _tamper_backward(self, pairs: PairBatch) -> Tensor:
        """The backward of the mean loss a pair, all ranks having equally many; return this rank's losses [B]."""
        parts, seen = list(pairs.split(self.micro_batch_size)), []
        for i, part in enumerate(parts):
            losses = self.loss(self._policy_logits, self._reference_logits, part)
            check_loss(losses.sum(), "demonstration", part.rejected.ids)
            self._backward(losses.sum() / len(pairs), i == len(parts) - 1)
            seen.append(losses.detach())
        return torch.cat(seen)

    def _retain_backward(self, batch: SupervisedBatch) -> Tensor:
        """The backward of ``lambda_retain`` times what is to be kept, over all ranks; return this rank's share of it.

        NLL an answer token, and distance a token.
        """
        answers, tokens = (self._mean_over_ranks(mask.sum().double()) for mask in (batch.answer_mask, batch.mask))
        parts, seen = list(batch.split(self.micro_batch_size)), []
        for i, part in enumerate(parts):
            before = self._reference_hidden(part)
            out = forward(self.policy_model, part, hidden=True)
            nll = completion_nll(out.logits[:, :-1], part.input_ids[:, 1:], part.answer_mask[:, 1:])
            distance = _distance(out.hidden_states, before)
            loss = nll.sum() / answers + self.lambda_distance * torch.where(part.mask, distance, 0).sum() / tokens
            check_loss(loss, "demonstration", part.ids)
            self._backward(self.lambda_retain * loss, i == len(parts) - 1)
            seen.append(loss.detach())
            self.train_averages.update("retain_nll", nll, part.answer_mask[:, 1:])
            self.train_averages.update("retain_distance", distance, part.mask)
        return torch.stack(seen).sum()

    def _reference_hidden(self, batch: SupervisedBatch) -> tuple[Tensor, ...]:
        """To be run before the policy: FSDP1 recomputes activations with the weights of the latest pass."""
        with torch.no_grad(), self.reference.active(self.policy_model, self.reference_model) as frozen:
            hidden: tuple[Tensor, ...] = forward(frozen, batch, hidden=True).hidden_states
        return hidden

    def _policy_logits(self, batch: SupervisedBatch) -> Tensor:
        logits: Tensor = forward(self.policy_model, batch).logits[:, :-1]
        return logits

    def _reference_logits(self, batch: SupervisedBatch) -> Tensor:
        with torch.no_grad(), self.reference.active(self.policy_model, self.reference_model) as frozen:
            logits: Tensor = forward(frozen, batch).logits[:, :-1]
        return logits

    # Validation

    def on_validation_start(self) -> None:
        """Start the averages afresh."""
        self.eval_averages.reset()

    @float32_by_default()
    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Measure the loss of held-out pairs under the policy as it is, not attacked."""
        with gathered(self.policy_model, self.reference_model):
            for part in batch.split(self.micro_batch_size):
                self.eval_averages.update("tamper", self.loss(self._policy_logits, self._reference_logits, part))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all held-out pairs and ranks."""
        self._log_evaluation("val", prog_bar=True)


def _distance(hidden: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> Tensor:
    """Squared Euclidean distance of hidden states, the mean over layers: [B, S]."""
    wide = torch.promote_types(hidden[0].dtype, torch.float32)
    layers = [(a.to(wide) - b.to(wide)).square().sum(-1) for a, b in zip(hidden, before, strict=True)]
    return torch.stack(layers).mean(0)


def forward(model: Any, batch: SupervisedBatch, hidden: bool = False) -> Any:
    """The output of ``model`` at every position of ``batch``, with the hidden states of all layers where asked."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
        output_hidden_states=hidden,
    )
