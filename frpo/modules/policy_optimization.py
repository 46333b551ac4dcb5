"""The training loop: prompts -> rollouts -> rewards -> objective -> optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from frpo.functional.masked import masked_mean
from frpo.models.policy import Policy
from frpo.models.reference import Reference
from frpo.models.sharding import gathered
from frpo.modules import checks
from frpo.modules.averages import Averages
from frpo.modules.group_gradient import GroupGradient, TokenPass
from frpo.modules.micro_batches import micro_batches
from frpo.modules.policy_module import PolicyModule
from frpo.modules.precision import float32_by_default
from frpo.modules.recording import NAMES, record_kl, record_objective, record_scored
from frpo.modules.sam import SAM
from frpo.objectives import FRPO, Objective
from frpo.penalty import KLPenalty
from frpo.rewards.base import Reward
from frpo.rewards.scoring import JudgementCounts, TwoValuedWatch, check_failure_rate, count_judgements, score
from frpo.rollouts.sampler import Sampler
from frpo.schedules import Schedule
from frpo.types import PromptBatch, RolloutBatch, ScoredBatch, Stage, StepRecord

# Each stage draws its sampling noise from a stream of its own.
STREAMS: dict[Stage, int] = {"train": 0, "val": 1, "test": 2}
EXACT_KL = KLPenalty(beta=0.0, estimator="full", logged="full")


class PolicyOptimization(PolicyModule):
    """Policy optimisation on groups of completions; which objective, reward and sampler is the configuration's.

    One training step draws a rollout, scores it, and takes ``epochs_per_rollout`` optimiser steps on it. A group need
    not fit in memory at once, and ``micro_batch_size`` has no influence on the result.

    Args:
        policy: the model that trains.
        objective: :class:`~frpo.objectives.FRPO` or :class:`~frpo.objectives.GRPO`.
        reward: scores completions.
        sampler: draws completions in training.
        reference: of the KL term; null only where beta is 0 throughout.
        kl: beta, its schedule, and the estimators; null takes KLPenalty's defaults.
        lam_schedule: sets the objective's lambda before each rollout (FRPO only); null leaves it.
        group_size: G, completions a prompt, at least 2.
        micro_batch_size: sequences in one forward and backward pass; memory only.
        epochs_per_rollout: optimiser steps on one rollout; beyond 1 the ratios leave 1 and are clipped.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by optimiser step; null leaves it constant.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        sam: takes each gradient at the worst weights nearby (sharpness-aware minimisation); null at the weights.
        val_sampler: draws completions in validation and test; null uses ``sampler``.
        val_group_size: completions a prompt there; null uses ``group_size``.
        rho: KL budget in nats a completion at which the worst-case reward is reported.
        on_reward_error: ``raise``, or ``failed``: an exception in a reward makes its completions failed.
        max_failure_rate: share of failed judgements in a step beyond which training stops.
        seed: of sampling, the only thing that is random here.
    """

    eval_averages: Averages
    last_step: StepRecord | None
    shown = ("reward", "kl", "loss", "ess")

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        reward: Reward,
        sampler: Sampler,
        reference: Reference | None = None,
        kl: KLPenalty | None = None,
        lam_schedule: Schedule | None = None,
        group_size: int = 8,
        micro_batch_size: int = 8,
        epochs_per_rollout: int = 1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: Schedule | None = None,
        max_grad_norm: float | None = 1.0,
        sam: SAM | None = None,
        val_sampler: Sampler | None = None,
        val_group_size: int | None = None,
        rho: float = 1.0,
        on_reward_error: Literal["raise", "failed"] = "raise",
        max_failure_rate: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, optimizer, lr_schedule, max_grad_norm, seed)
        self.objective, self.reward = objective, reward
        self.sampler, self.val_sampler = sampler, sampler if val_sampler is None else val_sampler
        self.reference, self.kl = reference, KLPenalty() if kl is None else kl
        self.group_size = group_size
        self.val_group_size = group_size if val_group_size is None else val_group_size
        self.micro_batch_size, self.epochs_per_rollout = micro_batch_size, epochs_per_rollout
        self.sam = sam
        self.lam_schedule = lam_schedule
        self.rho = rho
        self.on_reward_error, self.max_failure_rate = on_reward_error, max_failure_rate
        checks.check_configuration(self)
        self.last_step = None
        self._two_valued = TwoValuedWatch()
        self._reward_ready = self._self_checked = False

    # Construction

    def setup(self, stage: str) -> None:
        """Build the metrics, whose names include the tasks of the data."""
        tasks = sorted(getattr(getattr(self.trainer, "datamodule", None), "tasks", ()))
        names = [*NAMES, *(f"reward/{task}" for task in tasks)]
        self.train_averages, self.eval_averages = Averages(names), Averages(names)

    def load_models(self) -> None:
        """Load policy and reference."""
        self.policy_model = self.policy.load()
        if self.reference is not None:
            self.reference_model = self.reference.load(self.policy, self.policy_model)

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        checks.check_run(self)
        self._build_reward()

    def on_validation_start(self) -> None:
        """Build the reward where no fit did, and start the averages afresh."""
        checks.check_positions(self)
        self._build_reward()
        self.eval_averages.reset()

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def _build_reward(self) -> None:
        if not self._reward_ready:
            self.reward.setup(self.device)
            self._reward_ready = True

    # Training

    @float32_by_default()
    def training_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Walk a batch of prompts to an updated policy."""
        step = self.global_step
        if self.lam_schedule is not None:
            assert isinstance(self.objective, FRPO), "check_configuration lets no other objective have a lambda"
            self.objective.lam = self.lam_schedule.value(step)
        with self._phase("rollout"):
            rollout = self._sample(prompts, "train")
        with self._phase("reward"):
            scored = self._score(rollout)
        with self._phase("update"):
            scored, kl = self._update(scored, self.kl.coefficient(step, self._lam))
        self.last_step = StepRecord("train", step, scored)
        self._finish_step(scored, kl)

    def _sample(self, prompts: PromptBatch, stage: Stage) -> RolloutBatch:
        training = stage == "train"
        return (self.sampler if training else self.val_sampler).sample(
            self.policy_model,
            self.tokenizer,
            prompts,
            group_size=self.group_size if training else self.val_group_size,
            seed=self.seed * len(STREAMS) + STREAMS[stage],
        )

    def _score(self, rollout: RolloutBatch) -> ScoredBatch:
        scored = score(self.reward, rollout, on_error=self.on_reward_error)
        counts = count_judgements(scored.judgements)
        local = torch.tensor([counts.n_total, counts.n_failed, counts.n_abstained], device=self.device)
        total, failed, abstained = self.trainer.strategy.reduce(local, reduce_op="sum").tolist()
        check_failure_rate(JudgementCounts(total, failed, abstained, counts.reasons), self.max_failure_rate)
        warning = self._two_valued.observe(scored.rewards, scored.reward_mask)
        if warning is not None:
            rank_zero_warn(warning)
        return scored

    def _update(self, scored: ScoredBatch, beta: float) -> tuple[ScoredBatch, float]:
        """Take ``epochs_per_rollout`` optimiser steps on one rollout; return it with its weights, and the KL before.

        The weights are the on-policy ones; the KL is in nats a token, over all ranks.
        """
        rollout, rewards, members = scored.rollout, scored.rewards, scored.reward_mask
        gradient = GroupGradient(self.objective, self._token_pass(self.sampler), self.micro_batch_size)
        groups = self._mean_over_ranks((members.sum(-1) >= 2).sum().float())
        upper = self.objective.upper_side(rewards, members)
        weights: Tensor | None = None
        old_logps: Tensor | None = None
        kl_before = 0.0

        def accumulate() -> tuple[Tensor, Tensor, Tensor]:
            """Add the gradient at the present weights; off-policy as soon as ``old_logps`` are known."""
            ratios = None if old_logps is None else gradient.ratios(rollout, old_logps, upper)
            coefficients = self.objective.coefficients(rewards, members, ratios, groups)
            checks.check_finite(coefficients, scored)
            logps, kl = gradient.backward(
                rollout, self._backward, coefficients=coefficients, beta=beta, old_logps=old_logps, upper=upper
            )
            return coefficients, logps, kl

        for epoch in range(self.epochs_per_rollout):
            coefficients, logps, kl = accumulate()
            if epoch == 0:
                weights, old_logps = coefficients, logps
                kl_before = self._mean_over_ranks(masked_mean(kl, rollout.mask).mean()).item()
                self._self_check(rollout, logps, kl)
                self._record(scored, kl, beta)
            elif old_logps is not None:
                share = self.objective.clipped_share(logps, rollout.mask, old_logps=old_logps)
                self.train_averages.update("clipped", share)
            if self.sam is not None:
                self._move_gradient(self.sam, accumulate)
            self._optimizer_step()
        return replace(scored, weights=weights), kl_before

    def _token_pass(self, sampler: Sampler) -> TokenPass:
        return TokenPass(self.policy_model, self.reference, self.reference_model, sampler, self.kl)

    def _move_gradient(self, sam: SAM, accumulate: Callable[[], object]) -> None:
        before, after = sam.move_gradient(self.policy_model, accumulate)
        self.train_averages.update("sam_norm_before", before)
        self.train_averages.update("sam_norm_after", after)

    @property
    def _lam(self) -> float | None:
        return self.objective.lam if isinstance(self.objective, FRPO) else None

    def _self_check(self, rollout: RolloutBatch, logps: Tensor, kl: Tensor) -> None:
        gap = masked_mean((rollout.logps - logps).abs(), rollout.mask)
        self.train_averages.update("sampler_gap", gap)
        if self._self_checked:
            return
        half = "16" in str(self.trainer.precision) or self.policy.dtype in ("bfloat16", "float16")
        checks.check_ratios(gap, half=half)
        if self.reference is not None and self.global_step == 0 and self.reference.starts_at_policy(self.policy):
            checks.check_initial_kl(masked_mean(kl, rollout.mask), half=half)
        self._self_checked = True

    # Metrics

    def _record(self, scored: ScoredBatch, kl: Tensor, beta: float) -> None:
        averages = self.train_averages
        record_scored(averages, scored, self.rho)
        record_objective(averages, scored, self.objective)
        if self.reference is not None:
            record_kl(averages, kl, scored.rollout.mask)
        averages.update("beta", beta)
        if self._lam is not None:
            averages.update("lambda", self._lam)

    def _finish_step(self, scored: ScoredBatch, kl: float) -> None:
        """Let the schedules see the step on all ranks; log the averages since the last time metrics were logged."""
        rewards, members = (self._all_ranks(x) for x in (scored.rewards, scored.reward_mask))
        for schedule in self.schedules().values():
            schedule.observe(kl=kl, rewards=rewards, reward_mask=members)
        self._log_training(self.last_step.step if self.last_step else 0)

    def _all_ranks(self, rows: Tensor) -> Tensor:
        gathered: Any = self.all_gather(rows)
        return gathered.reshape(-1, rows.shape[-1])

    # Validation and test

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Sample, score, and measure the KL of held-out prompts."""
        self._evaluate(prompts, "val")

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """As validation, with the test stream of noise."""
        self._evaluate(prompts, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the averages over all held-out prompts and ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """As for validation."""
        self._log_evaluation("test")

    @float32_by_default()
    def _evaluate(self, prompts: PromptBatch, stage: Stage) -> None:
        with gathered(self.policy_model, self.reference_model):
            self._measure(prompts, stage)

    def _measure(self, prompts: PromptBatch, stage: Stage) -> None:
        rollout = self._sample(prompts, stage)
        scored = self._score(rollout)
        record_scored(self.eval_averages, scored, self.rho)
        if self.reference is not None:
            # Exact over the vocabulary: a sampled estimate would be one of the training sampler's distribution only.
            token_pass = replace(self._token_pass(self.sampler), kl=EXACT_KL)
            for batch in micro_batches(rollout, self.micro_batch_size):
                record_kl(self.eval_averages, token_pass(batch, with_reference=True).kl_logged, batch.mask)
        self.last_step = StepRecord(stage, self.global_step, scored)

    def _log_evaluation(self, stage: Stage) -> None:
        for name, value in self.eval_averages.compute().items():
            self.log(f"{stage}/{name}", value, rank_zero_only=True)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.global_step), rank_zero_only=True)

    def schedules(self) -> dict[str, Schedule]:
        """The schedules in use, by what they set."""
        named = {"beta": self.kl.beta, "lambda": self.lam_schedule, "lr": self.lr_schedule}
        return {name: schedule for name, schedule in named.items() if schedule is not None}
