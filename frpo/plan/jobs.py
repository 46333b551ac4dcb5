"""What a configuration trains, in the numbers that memory depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from frpo.functional.likelihood import completion_nll
from frpo.functional.masked import masked_mean
from frpo.models.policy import DTYPES, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy, Reference
from frpo.models.scorer import Scorer
from frpo.modules.micro_batches import MicroBatch, TokenPass
from frpo.penalty import KLPenalty
from frpo.plan.blank import BlankModel, blank_base, blank_models, blank_policy, blank_reference, blank_scorer
from frpo.plan.phases import Rollout, Update, reward_phase, rollout_phase, update_phase
from frpo.plan.plan import Phase
from frpo.rewards.base import Reward


@dataclass(frozen=True)
class Models:
    """The models of a job on the meta device."""

    trained: Any
    reference: Any
    scorers: Sequence[BlankModel]


@dataclass(frozen=True)
class Change:
    """A setting to turn, and the job with it turned, gently first. ``phases`` are those it helps; null for all."""

    setting: str
    jobs: tuple[tuple[str, Job], ...]
    phases: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Job(ABC):
    """A training step.

    ``autocast`` is whether its arithmetic is bfloat16 beside wider weights; ``cast`` is the type that the Trainer gives
    to all weights of policy and reference, null where they stay as loaded.
    """

    policy: Policy
    optimizer: OptimizerCallable
    micro_batch_size: int
    autocast: bool
    cast: torch.dtype | None = field(default=None, kw_only=True)
    kl_to: Sequence[str] = field(default=(), kw_only=True)
    """Frozen models of the run's evaluation. These and those of ``scores`` stay from the first evaluation on."""
    scores: Mapping[str, Reward] = field(default_factory=dict, kw_only=True, repr=False)
    """What judges the completions of the run's evaluation, by the name it is shown by."""
    known: dict[Hashable, Phase] = field(default_factory=dict, kw_only=True, repr=False, compare=False)
    """Phases that were computed already, for this job or one that differs in some settings alone."""

    def models(self) -> Models:
        """Build the models without weights, cast as the Trainer casts them."""
        models = self.blank()
        for model in (models.trained, models.reference):
            for parameter in () if model is None or self.cast is None else model.parameters():
                parameter.data = parameter.data.to(self.cast)
        return models

    def evaluated(self) -> Iterator[tuple[str, nn.Module]]:
        """The models of the evaluation without weights, with what each is for."""
        for path in self.kl_to:
            yield f"kl_to {path}", blank_base(self.policy, path)
        for name, reward in self.scores.items():
            yield from ((f"{name}: {model.name}", model.model) for model in blank_models(reward))

    @abstractmethod
    def blank(self) -> Models:
        """Build the models without weights, in the types they are loaded in."""

    @abstractmethod
    def update(self, trained: Any) -> Update:
        """The forward and backward passes of a step on the model that trains."""

    def phases(self, models: Models) -> list[Phase]:
        """What each part of a step holds, but for the optimiser's own step."""
        others = [] if models.reference is None else [models.reference]
        settings = (self.micro_batch_size, self.policy.dtype, self.policy.gradient_checkpointing, len(others))
        return [
            self._once(
                ("update", *settings),
                lambda: update_phase(models.trained, others, self.update(models.trained), autocast=self.autocast),
            )
        ]

    def changes(self) -> list[Change]:
        """Settings that take less memory and leave the result (up to rounding) as it is."""
        found = [Change("model.init_args.micro_batch_size", self._smaller_batches(), ("update",))]
        if not self.policy.gradient_checkpointing and type(self.policy) is Policy:
            job = self._with(gradient_checkpointing=True)
            found.append(Change(f"{self.where}.gradient_checkpointing", (("true", job),), ("update",)))
        if self.policy.adapter is not None and self.cast is None and self.policy.dtype in ("float32", "float64"):
            found.append(Change(f"{self.where}.dtype", (("bfloat16", self._with(dtype="bfloat16")),)))
        return [change for change in found if change.jobs]

    where = "model.init_args.policy.init_args"
    """Where the policy's settings stand."""

    def _smaller_batches(self) -> tuple[tuple[str, Job], ...]:
        sizes = sorted({self.micro_batch_size // 2, self.micro_batch_size // 4, 1} - {0, self.micro_batch_size})
        return tuple((str(size), replace(self, micro_batch_size=size)) for size in reversed(sizes))

    def _with(self, **settings: Any) -> Job:
        policy = copy(self.policy)
        for name, value in settings.items():
            setattr(policy, name, value)
        return replace(self, policy=policy)

    def _once(self, key: Hashable, trace: Callable[[], Phase]) -> Phase:
        if key not in self.known:
            self.known[key] = trace()
        return self.known[key]

    @property
    def _logit_bytes(self) -> int:
        return 2 if self.autocast else (self.cast or DTYPES[self.policy.dtype]).itemsize


@dataclass(frozen=True)
class PolicyJob(Job):
    """A step of :class:`~frpo.modules.policy_optimization.PolicyOptimization`."""

    reference: Reference | None
    kl: KLPenalty
    reward: Reward
    rollouts: tuple[Rollout, ...]
    copies: int

    def blank(self) -> Models:
        """See :class:`Job`."""
        trained = blank_policy(self.policy)
        reference = None if self.reference is None else blank_reference(self.reference, self.policy, trained)
        return Models(trained, reference, blank_models(self.reward))

    def phases(self, models: Models) -> list[Phase]:
        """See :class:`Job`."""
        completions = self.rollouts[0].prompts * self.rollouts[0].group_size
        drawn = [
            self._once(
                (r.name, r.at_once, self.policy.dtype),
                partial(rollout_phase, models.trained, r, autocast=self.autocast),
            )
            for r in self.rollouts
        ]
        judged = [self._once(s.name, partial(reward_phase, s, completions)) for s in models.scorers]
        return [*drawn, *judged, *super().phases(models)]

    def update(self, trained: Any) -> Update:
        """See :class:`Job`."""
        rollout = self.rollouts[0]
        L, T = rollout.prompt_tokens, rollout.sampler.max_new_tokens
        completions = rollout.prompts * rollout.group_size
        b = min(self.micro_batch_size, completions)
        sets = 2 if self.kl.estimator == "full" and self.reference is not None else 1

        def forward(model: Any, frozen: Any) -> tuple[Tensor, Any]:
            ids, mask = torch.ones(b, L + T, dtype=torch.int64), torch.ones(b, T, dtype=torch.bool)
            batch = MicroBatch(ids[:, 0], ids, ids, ids, ids[:, L:], mask)
            token_pass = TokenPass(model, self.reference, frozen, rollout.sampler, self.kl)
            tokens = token_pass(batch, with_reference=True)
            loss = masked_mean(tokens.logps, mask).sum()
            return (loss if self.kl.is_off else loss + masked_mean(tokens.kl, mask).sum()), tokens

        V = trained.config.get_text_config().vocab_size
        second = ", and the reference's for the full KL" if sets == 2 else ""
        return Update(
            forward,
            f"micro-batch of {b} x {L} + {T} tokens",
            passes=-(-completions // b),
            logits=sets * b * (T + 1) * V * self._logit_bytes,
            logits_how=f"{sets} x [{b}, {T} + 1, {V}] of {self._logit_bytes} bytes{second}",
            copies=self.copies,
        )

    def changes(self) -> list[Change]:
        """See :class:`Job`."""
        found, rollout = super().changes(), self.rollouts[0]
        options = sorted({p * rollout.group_size for p in (rollout.at_once // 2, rollout.at_once // 4, 1)} - {0})
        if rollout.at_once > 1:
            jobs = tuple((str(n), self._decoding(n)) for n in reversed(options))
            found.append(Change("model.init_args.sampler.init_args.max_sequences", jobs, ("rollout", "validation")))
        if isinstance(self.reference, FrozenCopy) and self.reference.path is None and self.policy.adapter is not None:
            job = replace(self, reference=AdapterDisabled())
            found.append(Change("model.init_args.reference", (("frpo.models.reference.AdapterDisabled", job),)))
        return found

    def _decoding(self, sequences: int) -> PolicyJob:
        def limited(rollout: Rollout) -> Rollout:
            sampler = copy(rollout.sampler)
            sampler.max_sequences = sequences
            return replace(rollout, sampler=sampler)

        return replace(self, rollouts=tuple(limited(rollout) for rollout in self.rollouts))


@dataclass(frozen=True)
class SupervisedJob(Job):
    """A step of :class:`~frpo.modules.supervised.SupervisedFineTuning` on ``rows`` rows of ``tokens`` tokens."""

    rows: int
    tokens: int

    def blank(self) -> Models:
        """See :class:`Job`."""
        return Models(blank_policy(self.policy), None, ())

    def update(self, trained: Any) -> Update:
        """See :class:`Job`."""
        b, S, V = min(self.micro_batch_size, self.rows), self.tokens, trained.config.get_text_config().vocab_size

        def forward(model: Any, frozen: Any) -> tuple[Tensor, Any]:
            ids = torch.ones(b, S, dtype=torch.int64)
            logits = model(
                input_ids=ids, attention_mask=ids, position_ids=ids, use_cache=False, logits_to_keep=S
            ).logits[:, :-1]
            return completion_nll(logits, ids[:, 1:], torch.ones(b, S - 1, dtype=torch.bool)).sum(), None

        return Update(
            forward,
            f"micro-batch of {b} x {S} tokens",
            passes=-(-self.rows // b),
            logits=b * S * V * self._logit_bytes,
            logits_how=f"[{b}, {S}, {V}] of {self._logit_bytes} bytes, for a prompt of one token",
        )


@dataclass(frozen=True)
class ScorerJob(Job):
    """A step of :class:`~frpo.reward_modelling.module.RewardModelling` on ``rows`` examples of ``responses``."""

    scorer: Scorer
    rows: int
    responses: int

    where = "model.init_args.scorer.init_args.base.init_args"

    def blank(self) -> Models:
        """See :class:`Job`."""
        scorer = copy(self.scorer)
        scorer.base = self.policy
        return Models(blank_scorer(scorer), None, ())

    def update(self, trained: Any) -> Update:
        """See :class:`Job`."""
        b, S = min(self.micro_batch_size, self.rows), self.scorer.max_length

        def forward(model: Any, frozen: Any) -> tuple[Tensor, Any]:
            ids = torch.ones(b * self.responses, S, dtype=torch.int64)
            return model(input_ids=ids, attention_mask=ids).logits.sum(), None

        return Update(
            forward,
            f"micro-batch of {b} x {self.responses} conversations of {S} tokens",
            passes=-(-self.rows // b),
            logits=0,
            logits_how="one number per conversation",
        )
