"""Schedules of beta, lambda and the learning rate: a value for each optimiser step, with state that resumes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from frpo.foundation import require
from frpo.functional.robust import solve_shared_lambda

# Bound of the relative KL error in the adaptive controller (Ziegler et al. 2019, section 2.2).
KL_ERROR_LIMIT = 0.2


class Schedule(ABC):
    """A number that may change over training."""

    @abstractmethod
    def value(self, step: int) -> float:
        """The value at optimiser step ``step`` (0 for the first)."""

    def observe(self, *, kl: float, rewards: Tensor, reward_mask: Tensor) -> None:  # noqa: B027
        """See a finished step: mean KL to the reference in nats per token, rewards and their mask [P, G].

        The values are those of all ranks, so that every rank's schedule stays the same.
        """

    def lower_bound(self) -> float:
        """The smallest value it can take, for checks before the first step."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """What changes; empty for a function of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        if state:
            raise ValueError(
                f"{type(self).__name__} has no state, but the checkpoint holds {sorted(state)}: it was written under "
                "another schedule; resume with the configuration of the run"
            )


class Constant(Schedule):
    """The same value at every step.

    >>> Constant(0.1).value(500)
    0.1
    """

    def __init__(self, value: float) -> None:
        self._value = float(require.number("Constant.value", value))

    def value(self, step: int) -> float:
        """See :class:`Schedule`."""
        return self._value

    def lower_bound(self) -> float:
        """See :class:`Schedule`."""
        return self._value


class _Curve(Schedule):
    """From ``start`` to ``end`` over ``steps``; the first ``warmup`` of them rise linearly from 0 to ``start``."""

    def __init__(self, start: float, end: float, steps: int, warmup: int = 0) -> None:
        name = type(self).__name__
        self.start, self.end = float(require.number(f"{name}.start", start)), float(require.number(f"{name}.end", end))
        self.warmup = require.number(f"{name}.warmup", warmup, at_least=0)
        self.steps = require.number(f"{name}.steps", steps, above=warmup, hint="the warmup is a part of the steps")

    def value(self, step: int) -> float:
        """See :class:`Schedule`; constant at ``end`` after ``steps``."""
        if step < self.warmup:
            return self.start * step / self.warmup
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.end + (self.start - self.end) * self._fall(progress)

    def lower_bound(self) -> float:
        """See :class:`Schedule`."""
        return min(self.start, self.end, 0.0 if self.warmup else self.start)

    @abstractmethod
    def _fall(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""


class Linear(_Curve):
    """A straight line from ``start`` to ``end``.

    >>> line = Linear(start=1.0, end=0.0, steps=10, warmup=2)
    >>> [line.value(step) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    def _fall(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(_Curve):
    """Half a cosine wave from ``start`` to ``end``.

    >>> wave = Cosine(start=1.0, end=0.0, steps=8)
    >>> [round(wave.value(step), 3) for step in (0, 2, 4, 8)]
    [1.0, 0.854, 0.5, 0.0]
    """

    def _fall(self, progress: float) -> float:
        return (1.0 + math.cos(math.pi * progress)) / 2.0


class AdaptiveKL(Schedule):
    """Beta that steers the KL to ``target``: ``beta *= 1 + gain * clip(KL/target - 1, -0.2, 0.2)``.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. KL and target are in nats per token.

    >>> beta = AdaptiveKL(initial=0.1, target=0.02)
    >>> beta.observe(kl=0.04, rewards=torch.ones(1, 2), reward_mask=torch.ones(1, 2, dtype=torch.bool))
    >>> round(beta.value(1), 4)  # too far away: 0.1 * (1 + 0.1 * 0.2)
    0.102
    """

    def __init__(self, initial: float, target: float, gain: float = 0.1) -> None:
        self._value = float(require.number("AdaptiveKL.initial", initial, above=0))
        self.target = require.number("AdaptiveKL.target", target, above=0)
        self.gain = require.number("AdaptiveKL.gain", gain, above=0)

    def value(self, step: int) -> float:
        """See :class:`Schedule`."""
        return self._value

    def observe(self, *, kl: float, rewards: Tensor, reward_mask: Tensor) -> None:
        """See :class:`Schedule`."""
        require.number("AdaptiveKL.observe(kl)", kl)
        error = min(KL_ERROR_LIMIT, max(-KL_ERROR_LIMIT, kl / self.target - 1))
        self._value *= 1 + self.gain * error

    def lower_bound(self) -> float:
        """See :class:`Schedule`; positive always."""
        return math.ulp(0.0)

    def state_dict(self) -> dict[str, Any]:
        """The current value."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._value = float(_entry(self, state, "value"))


class KLBudget(Schedule):
    """Lambda from a KL budget: the multiplier of ``rho`` nats of drift, solved on the rewards seen last.

    Users know how far fine-tuning will move the policy, not a multiplier. Each step solves the dual of the inner
    problem (frpo.functional.robust) on the last ``window`` groups, where the mean over prompts of the KL is ``rho``,
    and moves there by ``smoothing`` on a log scale. A group of G rewards cannot show a budget beyond log G; where the
    budget is out of reach lambda falls towards ``minimum``.

    Args:
        rho: budget in nats per completion, > 0.
        initial: lambda until the first rewards are seen.
        window: groups remembered.
        smoothing: share of the way (in log lambda) taken each step, in (0, 1].
        minimum: lambda never falls below this, in units of reward.
    """

    def __init__(
        self,
        rho: float,
        initial: float = 1.0,
        window: int = 256,
        smoothing: float = 0.2,
        minimum: float = 0.01,
    ) -> None:
        self.rho = require.number("KLBudget.rho", rho, above=0, hint="in nats: 0.5 or 1.0, say")
        self.window = require.number("KLBudget.window", window, at_least=1)
        self.smoothing = require.number("KLBudget.smoothing", smoothing, above=0, at_most=1)
        self._value = float(require.number("KLBudget.initial", initial, above=0))
        self.minimum = require.number("KLBudget.minimum", minimum, above=0, at_most=initial, hint="see initial")
        self._rewards: Tensor | None = None
        self._mask: Tensor | None = None

    def value(self, step: int) -> float:
        """See :class:`Schedule`."""
        return self._value

    def observe(self, *, kl: float, rewards: Tensor, reward_mask: Tensor) -> None:
        """See :class:`Schedule`."""
        usable = reward_mask.sum(-1) >= 2
        rewards, mask = rewards[usable].double().cpu(), reward_mask[usable].cpu()
        if self._rewards is not None and self._mask is not None:
            rewards, mask = torch.cat([self._rewards, rewards]), torch.cat([self._mask, mask])
        self._rewards, self._mask = rewards[-self.window :], mask[-self.window :]
        if len(self._rewards) == 0:
            return
        solved = max(self.minimum, solve_shared_lambda(self._rewards, self.rho, self._mask).item())
        self._value *= (solved / self._value) ** self.smoothing

    def lower_bound(self) -> float:
        """See :class:`Schedule`."""
        return self.minimum

    def state_dict(self) -> dict[str, Any]:
        """The current value and the rewards remembered."""
        return {"value": self._value, "rewards": self._rewards, "mask": self._mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Schedule`."""
        self._value = float(_entry(self, state, "value"))
        self._rewards, self._mask = _entry(self, state, "rewards"), _entry(self, state, "mask")


def _entry(owner: Schedule, state: dict[str, Any], key: str) -> Any:
    if key not in state:
        raise ValueError(
            f"{type(owner).__name__}: the checkpoint's schedule state holds {sorted(state)}, expected {key!r}: it "
            "was written under another schedule; resume with the configuration of the run"
        )
    return state[key]
