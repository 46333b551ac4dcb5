"""From a rollout and a reward to a scored batch, and what to watch about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frpo.foundation import require
from frpo.rewards.base import Reward
from frpo.rewards.calls import RewardError, call_reward
from frpo.types import Completion, Judgement, RolloutBatch, ScoredBatch


def score(reward: Reward, rollout: RolloutBatch, *, on_error: Literal["raise", "failed"] = "raise") -> ScoredBatch:
    """Judge the P*G completions of ``rollout``; only values enter ``rewards``, everything else is masked.

    ``on_error`` says what an exception in the reward becomes: "raise" stops the run; "failed" judges the
    completions again one at a time and makes a failed judgement of each that raises (of all, where ``reward`` is
    collective). Never a reward of 0.

    Raises:
        RewardError: the reward raised and ``on_error`` is "raise".
        UnusableRewardError: under either setting: the reward can judge nothing as it is set up.
        MalformedJudgementsError: a ``ValueError``, under either setting: the reward did not return one judgement
            per completion.
    """
    require.one_of("on_error", on_error, ("raise", "failed"))
    completions = rollout.completions()
    try:
        judgements = call_reward(reward, completions)
    except RewardError as error:
        if on_error == "raise":
            raise
        if reward.collective:  # alone, this rank would be out of step with the others
            judgements = [Judgement.failed(str(error))] * len(completions)
        else:
            judgements = [_judge_alone(reward, completion) for completion in completions]
    shape = tuple(rollout.completion_ids.shape[:2])
    valued = [judgement.status == "value" for judgement in judgements]
    values = [j.value if ok else 0.0 for j, ok in zip(judgements, valued, strict=True)]
    device = rollout.completion_ids.device
    return ScoredBatch(
        rollout=rollout,
        rewards=torch.tensor(values, dtype=torch.float64, device=device).reshape(shape),
        reward_mask=torch.tensor(valued, dtype=torch.bool, device=device).reshape(shape),
        judgements=tuple(judgements),
    )


def _judge_alone(reward: Reward, completion: Completion) -> Judgement:
    try:
        return call_reward(reward, [completion])[0]
    except RewardError as error:
        return Judgement.failed(str(error))


@dataclass(frozen=True)
class JudgementCounts:
    """How many of ``n_total`` completions have no reward; ``reasons`` pairs the commonest failures with counts."""

    n_total: int
    n_failed: int
    n_abstained: int
    reasons: tuple[tuple[str, int], ...] = ()

    @property
    def failure_rate(self) -> float:
        """Failures over the completions that did not abstain; 0 where all of them did."""
        judged = self.n_total - self.n_abstained
        return self.n_failed / judged if judged else 0.0


def count_judgements(judgements: Sequence[Judgement]) -> JudgementCounts:
    """Count failures and abstentions; ``reasons`` are the three commonest of the failures."""
    statuses = Counter(judgement.status for judgement in judgements)
    reasons = Counter(judgement.reason for judgement in judgements if judgement.status == "failed")
    return JudgementCounts(
        n_total=len(judgements),
        n_failed=statuses["failed"],
        n_abstained=statuses["abstain"],
        reasons=tuple(reasons.most_common(3)),
    )


def check_failure_rate(counts: JudgementCounts, max_failure_rate: float) -> None:
    """Raise :class:`RewardError` where more than ``max_failure_rate`` of the judgements failed.

    The denominator is the completions that did not abstain; ``counts`` may be summed over ranks. A judge that
    fails often fails selectively, and what is left trains the policy on whatever it can still read.
    """
    require.number("max_failure_rate", max_failure_rate, at_least=0, at_most=1, hint="it is a share")
    if counts.failure_rate > max_failure_rate:
        reasons = "; ".join(f"{n} x {reason or 'no reason given'}" for reason, n in counts.reasons)
        raise RewardError(
            f"{counts.n_failed} of {counts.n_total - counts.n_abstained} judgements failed "
            f"({counts.failure_rate:.0%}), over max_failure_rate={max_failure_rate:.0%}. Commonest reasons here: "
            f"{reasons or 'none on this rank'}. Repair the reward, or raise max_failure_rate to train without "
            "these completions"
        )


class TwoValuedWatch:
    """Notices that every reward so far is one of at most two numbers.

    Policies with equal success rates then have equal worst cases, so FRPO has nothing to add over GRPO.
    ``patience`` is the number of rewards to see before saying so.
    """

    def __init__(self, patience: int = 256) -> None:
        self.patience = patience
        self.seen = 0
        self.distinct: set[float] = set()
        self.said = False

    @property
    def two_valued(self) -> bool:
        """Whether the rewards seen so far take at most two values."""
        return len(self.distinct) <= 2

    def observe(self, rewards: Tensor, mask: Tensor) -> str | None:
        """Take in ``rewards`` [P, G] where ``mask`` [P, G] is True; return the warning, once, when it is due."""
        if self.said or not self.two_valued:
            return None
        values = rewards[mask]
        self.seen += values.numel()
        self.distinct.update(values.unique().tolist())
        if not self.two_valued or self.seen < self.patience:
            return None
        self.said = True
        return (
            f"all {self.seen} rewards seen so far are one of {sorted(self.distinct)}: with two-valued rewards FRPO "
            "has nothing to add over GRPO. Grade the reward, for instance with frpo.rewards.compose.WeightedSum"
        )
