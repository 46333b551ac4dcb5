"""Objectives: log-probabilities and rewards of a group in, loss and metrics out.

Every objective here depends on the policy only through one number per completion, the mean clipped ratio a_i, and is a
function of the group's a_1..a_G and rewards. That is what makes micro-batching exact: the gradient of a batch is
sum_i (dL/da_i) grad a_i, with coefficients known for the whole group before any micro-batch is run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from frpo.estimators import Estimator, Jackknife
from frpo.foundation import require
from frpo.functional.masked import masked_mean
from frpo.functional.ratio import exp_ratio, log_ratio, sequence_ratio, token_mean_ratio

Ratio = Literal["token", "sequence"]
Clip = Literal["reference", "ppo"]

# Added to a group's standard deviation under `scale_rewards`: the value of TRL's GRPOTrainer.
STD_EPSILON = 1e-4
# A coefficient of 0 (equal rewards) is a few times float32's rounding either side of it, and takes the minimum.
SIGN_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ObjectiveOutput:
    """``loss``, a scalar to minimise, and ``metrics``, detached scalars that say their denominator where computed."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(ABC):
    """A loss on groups of completions. Calling it is the whole computation; training uses its two halves.

    Shapes: ``logps``, ``old_logps`` [P, G, T]; ``mask`` bool [P, G, T]; ``rewards`` [P, G]; ``reward_mask`` bool
    [P, G], False where a completion has no reward and leaves its group. A group with fewer than 2 rewards is dropped,
    and the loss is the mean over the groups that remain (0 if none does).
    """

    def __init__(self, clip_low: float, clip_high: float, ratio: Ratio) -> None:
        name = type(self).__name__
        self.clip_low = require.number(
            f"{name}.clip_low", clip_low, at_least=0, below=1, hint="ratios are positive, and 0.2 is usual"
        )
        self.clip_high = require.number(f"{name}.clip_high", clip_high, at_least=0, finite=False, hint="0.2 is usual")
        self.ratio = require.one_of(f"{name}.ratio", ratio, Ratio)

    def __call__(
        self,
        logps: Tensor,
        rewards: Tensor,
        mask: Tensor,
        old_logps: Tensor | None = None,
        reward_mask: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss and metrics of whole groups held in memory; see the class for shapes."""
        if logps.dim() != 3 or rewards.shape != logps.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}: got logps {tuple(logps.shape)} and rewards {tuple(rewards.shape)}, "
                "expected [P, G, T] and [P, G]"
            )
        a = self.ratios(logps, mask, old_logps=old_logps, upper=self.upper_side(rewards, reward_mask))
        groups = self.group_metrics(rewards, reward_mask)
        metrics = {name: values.mean() for name, values in groups.items() if len(values)}
        return ObjectiveOutput(self.group_loss(a, rewards, reward_mask), metrics)

    def ratios(
        self, logps: Tensor, mask: Tensor, *, old_logps: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        """The mean clipped ratio a_i of each sequence: [..., T] -> [...], in float32 or wider.

        ``upper`` (bool [...]) comes from :meth:`upper_side`. On-policy (``old_logps=None``) every a_i is 1 and its
        gradient is that of the mean log-probability.
        """
        wide = logps.to(torch.promote_types(logps.dtype, torch.float32))
        logs = log_ratio(logps=wide, old_logps=old_logps, mask=mask)
        function = token_mean_ratio if self.ratio == "token" else sequence_ratio
        a = function(logs, mask, clip_low=self.clip_low, clip_high=self.clip_high, upper=upper)
        return torch.where(mask.any(-1), a, 1.0)

    def group_loss(
        self,
        a: Tensor,
        rewards: Tensor,
        reward_mask: Tensor | None = None,
        num_groups: Tensor | float | None = None,
    ) -> Tensor:
        """Loss from the ratios ``a`` [P, G]: the sum over groups divided by ``num_groups``.

        ``num_groups`` defaults to the number of groups here that have 2 rewards; under data parallelism it is the mean
        of that number over the ranks, so that the average over ranks is the mean over all groups.
        """
        losses, kept = self.group_losses(a, rewards, reward_mask)
        count = torch.as_tensor(kept.sum() if num_groups is None else num_groups, dtype=a.dtype, device=a.device)
        return losses.sum() / count.clamp(min=torch.finfo(a.dtype).tiny)

    def group_losses(self, a: Tensor, rewards: Tensor, reward_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of each group [P], 0 for a group with fewer than 2 rewards, and which groups count (bool [P])."""
        if a.shape[-1] < 2:
            raise ValueError(
                f"{type(self).__name__} compares the completions of a group and needs at least 2, got {a.shape[-1]}; "
                "raise group_size"
            )
        members, kept = _members(rewards, reward_mask)
        # A dropped group is computed on stand-in values, so that no NaN enters the gradient, and then left out.
        members = members | ~kept.unsqueeze(-1)
        rewards = torch.where(members & kept.unsqueeze(-1), rewards.to(a.dtype), 0)
        per_group = self._per_group(torch.where(members, a, 1.0), rewards, members)
        return torch.where(kept, per_group, 0), kept

    def clipped_share(self, logps: Tensor, mask: Tensor, *, old_logps: Tensor) -> Tensor:
        """Share of each sequence's ratios (its tokens', or its one) outside the clip range: [..., T] -> [...]."""
        logs = log_ratio(logps=logps, old_logps=old_logps, mask=mask)
        if self.ratio == "sequence":
            logs = masked_mean(logs, mask).unsqueeze(-1).expand_as(logs)
        ratio = exp_ratio(logs)
        return masked_mean(((ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high)).to(ratio.dtype), mask)

    def group_metrics(self, rewards: Tensor, reward_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Diagnostics of each of the P' <= P groups that count, known from the rewards alone: float [P'] each."""
        members, kept = _members(rewards, reward_mask)
        rewards, members = rewards.detach()[kept], members[kept]
        wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        return self._metrics(torch.where(members, wide, 0), members)

    def coefficients(
        self,
        rewards: Tensor,
        reward_mask: Tensor | None = None,
        ratios: Tensor | None = None,
        num_groups: Tensor | float | None = None,
    ) -> Tensor:
        """dL/da_i at ``ratios`` (1 when None, the on-policy case): [P, G], 0 for completions that do not count."""
        wide = torch.promote_types(rewards.dtype, torch.float32)
        a = torch.ones_like(rewards, dtype=wide) if ratios is None else ratios.detach().clone()
        with torch.enable_grad():
            a.requires_grad_()
            loss = self.group_loss(a, rewards.detach(), reward_mask, num_groups)
            return torch.autograd.grad(loss, a)[0]

    def upper_side(self, rewards: Tensor, reward_mask: Tensor | None = None) -> Tensor | None:
        """Which sequences are clipped by the maximum (bool [P, G]); None where all take the minimum."""
        return self.coefficients(rewards, reward_mask, num_groups=1.0) > SIGN_TOLERANCE

    @abstractmethod
    def _per_group(self, a: Tensor, rewards: Tensor, members: Tensor) -> Tensor:
        """Loss of each group, [P, G] -> [P]; every group has 2 members at least."""

    def _metrics(self, rewards: Tensor, members: Tensor) -> dict[str, Tensor]:
        """Diagnostics of each group, [P', G] -> [P'] by name."""
        low, high = (rewards.masked_fill(~members, x) for x in (torch.inf, -torch.inf))
        # Share of groups whose rewards are all equal: they teach nothing.
        return {"zero_variance": (low.amin(-1) == high.amax(-1)).to(rewards.dtype)}


class FRPO(Objective):
    """Fine-tuning Robust Policy Optimization (arXiv 2602.08813, section 4; its gradient, appendix E).

    ``L = log mean_i w_i a_i - mean_i a_i`` with ``w_i = exp(-(r_i - mean r)/lambda)``, times max(lambda, 1), averaged
    over prompts; the logarithm of the mean is estimated by ``estimator``. Minimising it maximises the entropic risk
    ``-lambda log E exp(-r/lambda)``: the reward that is left after the worst fine-tuning that costs KL at price lambda.

    On-policy the gradient is that of GRPO with the advantage -G c_i, where c_i = w_i/S - 1/G for the naive estimator.
    For lambda -> infinity, lambda c_i -> -A_i/G, which is GRPO's gradient; under the jackknife -A_i/(G-1), GRPO's
    times G/(G-1), as with a leave-one-out baseline. With rewards of two values only, policies of one success rate all
    have the same worst case and FRPO has nothing to add over GRPO: use graded rewards.

    Args:
        lam: lambda > 0, in units of reward.
        estimator: of the log-mean; a group needs 2 completions under the jackknife.
        baseline: subtract mean_i a_i, a control variate of expectation 1 (without it training is far noisier).
        clip_low, clip_high: token or sequence ratios are clipped to [1 - clip_low, 1 + clip_high].
        ratio: ``token``, one ratio per token, averaged over the completion; ``sequence``, one from the mean log-ratio.
        clip: ``reference`` takes the lower of clipped and unclipped ratio always, as the released trainer does; ``ppo``
            takes the pessimistic side by the sign of the completion's coefficient, for several passes over a rollout.
    """

    def __init__(
        self,
        lam: float = 1.0,
        estimator: Estimator | None = None,
        baseline: bool = True,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio: Ratio = "token",
        clip: Clip = "reference",
    ) -> None:
        super().__init__(clip_low, clip_high, ratio)
        self.lam = lam
        self.estimator = Jackknife() if estimator is None else estimator
        self.baseline, self.clip = baseline, require.one_of("FRPO.clip", clip, Clip)

    @property
    def lam(self) -> float:
        """Lambda; a schedule may set it during training."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        hint = "large values approach GRPO (or use frpo.objectives.GRPO), the published runs use 0.1 to 10"
        self._lam = float(require.number("FRPO.lam", value, above=0, hint=hint))

    def upper_side(self, rewards: Tensor, reward_mask: Tensor | None = None) -> Tensor | None:
        """See :class:`Objective`; None under ``clip: reference``."""
        return super().upper_side(rewards, reward_mask) if self.clip == "ppo" else None

    def _per_group(self, a: Tensor, rewards: Tensor, members: Tensor) -> Tensor:
        log_u = -_centred(rewards, members) / self.lam + a.log()
        loss = self.estimator.log_mean(log_u, members)
        if self.baseline:
            loss = loss - masked_mean(a, members)
        return max(self.lam, 1.0) * loss

    def _metrics(self, rewards: Tensor, members: Tensor) -> dict[str, Tensor]:
        log_w = -_centred(rewards, members) / self.lam
        weights = log_w.masked_fill(~members, -torch.inf).softmax(-1)
        estimated = self.estimator.weights(log_w, members)
        return {
            **super()._metrics(rewards, members),
            # Effective sample size of w, between 1 and G, per group.
            "ess": 1 / weights.square().sum(-1),
            # Share of completions whose weight in the estimate is negative, per group.
            "negative_weights": masked_mean((estimated < 0).to(rewards.dtype), members),
            "jackknife_fallback": self.estimator.falls_back(log_w, members).to(rewards.dtype),
        }


class GRPO(Objective):
    """Group Relative Policy Optimization (arXiv 2402.03300) in the length-normalised form: the baseline of FRPO.

    ``-mean_i A_i a_i`` averaged over prompts, with ``A_i = r_i - mean r`` and a_i the PPO-clipped mean ratio.

    Args:
        clip_low, clip_high, ratio: as in :class:`FRPO`; the pessimistic side of the clip is by the sign of A_i.
        scale_rewards: divide A_i by the group's standard deviation (ddof 1) + 1e-4, as the original paper does. It
            weights prompts by how much their completions agree (arXiv 2503.20783).
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio: Ratio = "token",
        scale_rewards: bool = False,
    ) -> None:
        super().__init__(clip_low, clip_high, ratio)
        self.scale_rewards = scale_rewards

    def _per_group(self, a: Tensor, rewards: Tensor, members: Tensor) -> Tensor:
        advantages = _centred(rewards, members)
        if self.scale_rewards:
            variance = advantages.square().sum(-1, keepdim=True) / (members.sum(-1, keepdim=True) - 1)
            advantages = advantages / (variance.sqrt() + STD_EPSILON)
        return -masked_mean(advantages * a, members)


def _members(rewards: Tensor, reward_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    members = torch.ones_like(rewards, dtype=torch.bool) if reward_mask is None else reward_mask
    if members.shape != rewards.shape or members.dtype != torch.bool:
        raise ValueError(
            f"got rewards {tuple(rewards.shape)} and reward_mask {tuple(members.shape)} {members.dtype}, "
            "expected [P, G] and a bool mask of the same shape"
        )
    return members, members.sum(-1) >= 2


def _centred(rewards: Tensor, members: Tensor) -> Tensor:
    return torch.where(members, rewards - masked_mean(rewards, members).unsqueeze(-1), 0)
