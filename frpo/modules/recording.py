"""Which quantities of a step are averaged, and over what."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frpo.functional.masked import masked_mean
from frpo.functional.robust import worst_case_reward
from frpo.modules.averages import Averages
from frpo.modules.rollout_update import RolloutUpdate
from frpo.objectives import FRPO
from frpo.types import ScoredBatch

NAMES = (
    "reward", "worst_case_reward", "loss", "kl", "kl_sequence", "length", "truncated", "failed", "abstained",
    "dropped_groups", "zero_variance", "ess", "negative_weights", "jackknife_fallback", "clipped", "sampler_gap",
    "grad_norm", "sam_norm_before", "sam_norm_after", "beta", "lambda", "lr", "seconds_rollout", "seconds_reward",
    "seconds_update",
)  # fmt: skip


def record_update(averages: Averages, update: RolloutUpdate, rho: float) -> None:
    """What a finished update saw: before its first optimiser step, but for ``clipped`` and the norms of SAM.

    ``sampler_gap`` is the mean |log ratio| of sampler and trainer over a completion's tokens, over completions;
    ``clipped`` the share of clipped ratios in each optimiser step but the first; ``beta`` and ``lambda`` per rollout.
    """
    rollout, objective, first = update.scored.rollout, update.objective, update.passes[0]
    record_scored(averages, update.scored, rho)
    record_groups(averages, update)
    averages.update("sampler_gap", masked_mean((rollout.logps - first.logps).abs(), rollout.mask))
    if update.token_pass.reference is not None:
        record_kl(averages, first.kl, rollout.mask)
    averages.update("beta", update.beta)
    if isinstance(objective, FRPO):
        averages.update("lambda", objective.lam)
    for later in update.passes[1:]:
        averages.update("clipped", objective.clipped_share(later.logps, rollout.mask, old_logps=first.logps))
    for before, after in update.sam_norms:
        averages.update("sam_norm_before", before)
        averages.update("sam_norm_after", after)


def record_scored(averages: Averages, scored: ScoredBatch, rho: float) -> None:
    """Rewards over the completions that have one (all, and by task); the rest over all completions.

    ``worst_case_reward`` is over the prompts with a reward: the least mean reward within ``rho`` nats of the group. It
    is left out where ``rho`` is beyond log G, which a group of G cannot show.
    """
    rewards, mask = scored.rewards, scored.reward_mask
    averages.update("reward", rewards, mask)
    if rho < math.log(rewards.shape[-1]):
        averages.update("worst_case_reward", worst_case_reward(rewards, rho, mask), mask.any(-1))
    averages.update("length", scored.rollout.lengths)
    averages.update("truncated", scored.rollout.truncated)
    for status, name in (("failed", "failed"), ("abstain", "abstained")):
        averages.update(name, torch.tensor([judgement.status == status for judgement in scored.judgements]))
    tasks = [prompt.task for prompt in scored.rollout.prompts.prompts]
    for name in averages.names:
        kind, _, task = name.partition("/")
        if kind == "reward" and task:
            rows = torch.tensor([t == task for t in tasks], device=mask.device).unsqueeze(-1)
            averages.update(name, rewards, mask & rows)


def record_groups(averages: Averages, update: RolloutUpdate) -> None:
    """Over the groups with at least 2 rewards: the on-policy loss without the KL term, and the group diagnostics."""
    rewards, members = update.scored.rewards, update.scored.reward_mask
    losses, kept = update.objective.group_losses(torch.ones_like(rewards), rewards, members)
    averages.update("loss", losses, kept)
    averages.update("dropped_groups", ~kept)
    for name, values in update.objective.group_metrics(rewards, members).items():
        averages.update(name, values)


def record_kl(averages: Averages, kl: Tensor, mask: Tensor) -> None:
    """Over completions: ``kl`` in nats per token (mean over a completion), ``kl_sequence`` in nats per completion."""
    averages.update("kl", masked_mean(kl, mask))
    averages.update("kl_sequence", torch.where(mask, kl, 0).sum(-1))
