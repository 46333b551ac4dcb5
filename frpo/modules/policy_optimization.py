"""The training loop: prompts -> rollouts -> rewards -> objective -> optimiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from frpo.foundation import require
from frpo.functional.masked import masked_mean
from frpo.models.policy import Policy
from frpo.models.reference import Reference
from frpo.models.sharding import gathered
from frpo.modules.averages import Averages
from frpo.modules.micro_batches import TokenPass, check_forward, micro_batches
from frpo.modules.numerics import check_initial_kl, check_ratios
from frpo.modules.policy_module import PolicyModule
from frpo.modules.precision import float32_by_default
from frpo.modules.recording import NAMES, record_kl, record_scored, record_update
from frpo.modules.rollout_update import RolloutUpdate
from frpo.modules.sam import SAM
from frpo.modules.strategy import check_precision
from frpo.objectives import FRPO, Objective
from frpo.penalty import KLPenalty
from frpo.rewards.base import Reward
from frpo.rewards.scoring import JudgementCounts, TwoValuedWatch, check_failure_rate, count_judgements, score
from frpo.rollouts.sampler import Sampler
from frpo.schedules import Schedule
from frpo.types import DataFacts, PromptBatch, RolloutBatch, ScoredBatch, Stage, StepRecord

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
        group_size: G, completions per prompt, at least 2.
        micro_batch_size: sequences in one forward and backward pass; memory only.
        epochs_per_rollout: optimiser steps on one rollout; beyond 1 the ratios leave 1 and are clipped.
        optimizer: takes the trainable parameters.
        lr_schedule: factor on the optimiser's learning rate by optimiser step; null leaves it constant.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        sam: takes each gradient at the worst weights nearby (sharpness-aware minimisation); null at the weights.
        val_sampler: draws completions in validation and test; null uses ``sampler``.
        val_group_size: completions per prompt there; null uses ``group_size``.
        rho: KL budget in nats per completion at which the worst-case reward is reported.
        on_reward_error: ``raise``, or ``failed``: an exception in a reward makes its completions failed.
        max_failure_rate: share of failed judgements in a step beyond which training stops.
        seed: of sampling, the only thing that is random here.
    """

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
        self.reference, self.kl, self.lam_schedule, self.sam = (
            reference,
            kl if kl is not None else KLPenalty(),
            lam_schedule,
            sam,
        )
        name = "PolicyOptimization"
        self.group_size = require.number(
            f"{name}.group_size", group_size, at_least=2, hint="a completion is compared with the others of its group"
        )
        self.val_group_size = require.number(f"{name}.val_group_size", val_group_size, at_least=1) or group_size
        self.micro_batch_size = require.number(f"{name}.micro_batch_size", micro_batch_size, at_least=1)
        self.epochs_per_rollout = require.number(f"{name}.epochs_per_rollout", epochs_per_rollout, at_least=1)
        self.rho = require.number(f"{name}.rho", rho, above=0)
        self.on_reward_error = require.one_of(f"{name}.on_reward_error", on_reward_error, ("raise", "failed"))
        self.max_failure_rate = require.number(f"{name}.max_failure_rate", max_failure_rate, at_least=0, at_most=1)
        self._check_together()
        self.last_step = None
        self._two_valued = TwoValuedWatch()
        self._reward_ready = self._self_checked = False

    def _check_together(self) -> None:
        """Refuse arguments that are right alone and cannot work together."""
        if self.policy.adapter is not None and self.policy.adapter.dropout > 0:
            raise ValueError(
                f"PolicyOptimization.policy.adapter.dropout must be 0, got {self.policy.adapter.dropout}: sampling and "
                "training have to see one policy, or the ratios are not 1 on-policy. Dropout is for "
                "SupervisedFineTuning"
            )
        if self.lam_schedule is not None:
            if not isinstance(self.objective, FRPO):
                raise ValueError(
                    "PolicyOptimization.lam_schedule schedules lambda, which "
                    f"{type(self.objective).__name__} does not have; remove it or write `objective: FRPO`"
                )
            require.number(
                "PolicyOptimization.lam_schedule",
                self.lam_schedule.lower_bound(),
                above=0,
                hint="it is the lowest value (a warm-up starts at 0); start and end above 0",
            )
        if self.reference is None and not self.kl.is_off:
            raise ValueError(
                "PolicyOptimization.reference is null but kl.beta is not 0 throughout; write `kl: {beta: 0}`, or a "
                "reference such as `reference: AdapterDisabled`"
            )
        sampler = self.sampler
        require.number(
            "PolicyOptimization.sampler.temperature",
            sampler.temperature,
            above=0,
            hint="greedy completions of a group are all equal; set it in `val_sampler` for greedy validation",
        )
        if sampler.truncates and (self.epochs_per_rollout > 1 or self.sam is not None):
            moved, instead = (
                ("sam", "Leave out sam")
                if self.sam is not None
                else (f"epochs_per_rollout={self.epochs_per_rollout}", "Write epochs_per_rollout: 1")
            )
            raise ValueError(
                f"PolicyOptimization: got {moved} with top_p={sampler.top_p}, top_k={sampler.top_k}; once the weights "
                "have moved, the set of tokens that sampling kept is unknown and the ratios would be those of another "
                f"policy. {instead}, or write top_p: 1.0 and top_k: null"
            )

    # Construction

    def on_data_read(self, facts: DataFacts) -> None:
        """Refuse tasks that the reward cannot score."""
        super().on_data_read(facts)
        self.reward.check_tasks(set(facts.tasks))

    def setup(self, stage: str) -> None:
        """Build the metrics, whose names include the tasks of the data."""
        super().setup(stage)
        names = [*NAMES, *(f"reward/{task}" for task in sorted(self.facts.tasks))]
        self.train_averages, self.eval_averages = Averages(names), Averages(names)

    def load_models(self) -> None:
        """Load policy and reference."""
        self.policy_model = self.policy.load()
        if self.reference is not None:
            self.reference_model = self.reference.load(self.policy, self.policy_model)

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        check_precision(self.trainer)
        check_forward(self.policy_model)
        self._check_positions()
        self._build_reward()

    def on_validation_start(self) -> None:
        """Build the reward where no fit did, and start the averages afresh."""
        self._check_positions()
        self._build_reward()
        self.eval_averages.reset()

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def _check_positions(self) -> None:
        prompt, answer = self.facts.max_tokens, max(self.sampler.max_new_tokens, self.val_sampler.max_new_tokens)
        if self.positions is not None and prompt + answer > self.positions:
            raise ValueError(
                f"max_prompt_length {prompt} + max_new_tokens {answer} = {prompt + answer} tokens, but "
                f"{self.policy.path!r} has positions for {self.positions}; lower data.init_args.max_prompt_length or "
                "sampler.init_args.max_new_tokens"
            )

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
            assert isinstance(self.objective, FRPO), "no other objective is let through with a lambda"
            self.objective.lam = self.lam_schedule.value(step)
        with self._phase("rollout"):
            rollout = self._sample(prompts, "train")
        with self._phase("reward"):
            scored = self._score(rollout)
        with self._phase("update"):
            update = self._update(scored)
            for _ in range(self.epochs_per_rollout):
                update.gradient()
                self._self_check(update)
                self._optimizer_step()
        record_update(self.train_averages, update, self.rho)
        self.last_step = StepRecord("train", step, replace(scored, weights=update.passes[0].coefficients))
        self._observe(update)
        self._log_training(step)

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

    def _update(self, scored: ScoredBatch) -> RolloutUpdate:
        lam = self.objective.lam if isinstance(self.objective, FRPO) else None
        return RolloutUpdate(
            scored,
            self.objective,
            self._token_pass(),
            self._backward,
            beta=self.kl.coefficient(self.global_step, lam),
            num_groups=self._mean_over_ranks((scored.reward_mask.sum(-1) >= 2).sum().float()),
            micro_batch_size=self.micro_batch_size,
            sam=self.sam,
        )

    def _token_pass(self) -> TokenPass:
        return TokenPass(self.policy_model, self.reference, self.reference_model, self.sampler, self.kl)

    def _self_check(self, update: RolloutUpdate) -> None:
        """Before the first update, sampler, trainer and reference have to agree on the policy."""
        if self._self_checked:
            return
        rollout, first = update.scored.rollout, update.passes[0]
        half = "16" in str(self.trainer.precision) or self.policy.dtype in ("bfloat16", "float16")
        check_ratios((rollout.logps - first.logps)[rollout.mask], half=half)
        if self.reference is not None and self.global_step == 0 and self.reference.starts_at_policy(self.policy):
            check_initial_kl(first.kl[rollout.mask], half=half)
        self._self_checked = True

    def _observe(self, update: RolloutUpdate) -> None:
        """Let the schedules see what all ranks saw: the KL before the update in nats per token, and the rewards."""
        kl = self._mean_over_ranks(masked_mean(update.passes[0].kl, update.scored.rollout.mask).mean()).item()
        rewards, members = (self._all_ranks(x) for x in (update.scored.rewards, update.scored.reward_mask))
        for schedule in self.schedules().values():
            schedule.observe(kl=kl, rewards=rewards, reward_mask=members)

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
            token_pass = replace(self._token_pass(), kl=EXACT_KL)
            for batch in micro_batches(rollout, self.micro_batch_size):
                record_kl(self.eval_averages, token_pass(batch, with_reference=True).kl_logged, batch.mask)
        self.last_step = StepRecord(stage, self.global_step, scored)

    def schedules(self) -> dict[str, Schedule]:
        """The schedules in use, by what they set."""
        named = {"beta": self.kl.beta, "lambda": self.lam_schedule, "lr": self.lr_schedule}
        return {name: schedule for name, schedule in named.items() if schedule is not None}
