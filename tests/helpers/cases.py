"""Inputs of an objective for the tests: random ones, and those of the released trainer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import oracles
import pytest
import torch
from oracles import Cube, Matrix, Row, Settings
from torch import Tensor

from frpo.estimators import Jackknife, Naive
from frpo.objectives import FRPO, GRPO, Objective

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "frpo_loss_cases.json"
REFERENCE_COUNT = 24
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True)
class Case:
    """One random input of an objective; ``old`` is None on-policy."""

    logps: Cube
    rewards: Matrix
    mask: list[list[list[bool]]]
    old: Cube | None
    reward_mask: list[list[bool]] | None
    settings: Settings

    @property
    def reference_logps(self) -> Cube:
        """The log-probabilities the ratios are taken against."""
        return self.logps if self.old is None else self.old

    def loss(self, logps: Cube | None = None, objective: Callable[..., float] = oracles.frpo_loss) -> float:
        """The oracle's loss, at other log-probabilities if given, the old ones held fixed."""
        moved = self.logps if logps is None else logps
        return objective(moved, self.rewards, self.mask, self.reference_logps, self.reward_mask, self.settings)

    def gradient(self, objective: Callable[..., float] = oracles.frpo_loss) -> Cube:
        """The oracle's gradient with respect to the log-probabilities, by finite differences."""
        P, G, T = len(self.logps), len(self.logps[0]), len(self.logps[0][0])

        def function(flat: Row) -> float:
            cube = [[flat[(p * G + g) * T : (p * G + g + 1) * T] for g in range(G)] for p in range(P)]
            return self.loss(cube, objective)

        flat = oracles.finite_difference(function, [x for group in self.logps for row in group for x in row])
        return [[flat[(p * G + g) * T : (p * G + g + 1) * T] for g in range(G)] for p in range(P)]

    def with_settings(self, settings: Settings) -> Case:
        return replace(self, settings=settings)


def _away_from_kinks(case: Case, margin: float = 4e-3) -> bool:
    edges = (math.log(1 - case.settings.low), math.log(1 + case.settings.high))
    for p, group in enumerate(case.logps):
        for g, row in enumerate(group):
            logs = [a - b for a, b, m in zip(row, case.reference_logps[p][g], case.mask[p][g], strict=True) if m]
            if case.settings.level == "sequence":
                logs = [sum(logs) / len(logs)]
            if any(abs(x - edge) < margin for x in logs for edge in edges):
                return False
    return True


def random_case(
    seed: int,
    settings: Settings,
    *,
    P: int = 3,
    G: int = 4,
    T: int = 3,
    off_policy: bool = True,
    masked_rewards: bool = False,
    spread: float = 0.35,
) -> Case:
    """A random case whose ratios keep clear of the corners of the clip, where no derivative exists."""
    generator = random.Random(seed)
    while True:
        logps = [[[-generator.uniform(0.1, 4) for _ in range(T)] for _ in range(G)] for _ in range(P)]
        old = [[[x + generator.gauss(0, spread) for x in row] for row in group] for group in logps]
        lengths = [[generator.randint(1, T) for _ in range(G)] for _ in range(P)]
        mask = [[[t < lengths[p][g] for t in range(T)] for g in range(G)] for p in range(P)]
        rewards = [[generator.uniform(0, 1) for _ in range(G)] for _ in range(P)]
        kept = None
        if masked_rewards:
            kept = [[generator.random() < 0.6 for _ in range(G)] for _ in range(P)]
        case = Case(logps, rewards, mask, old if off_policy else None, kept, settings)
        if _away_from_kinks(case):
            return case


def released_cases() -> list[dict]:
    """The inputs, losses and gradients of the released trainer; skips the test where the file is absent."""
    return json.loads(REFERENCE.read_text())


def grouped(rows: list, G: int) -> list:
    """Rows P*G cut into P groups of G."""
    return [rows[i : i + G] for i in range(0, len(rows), G)]


def released_mask(raw: dict) -> list[list[bool]]:
    return [[bool(m) for m in row] for row in raw["mask"]]


def released_case(raw: dict) -> Case:
    """One case of the released trainer, without its KL term."""
    G = raw["group_size"]
    settings = Settings(
        lam=raw["lam"],
        jackknife=raw["jackknife"],
        baseline=raw["baseline"],
        low=raw["eps_low"],
        high=raw["eps_high"],
        level=raw["level"],
    )
    return Case(
        logps=grouped(raw["logps"], G),
        rewards=grouped(raw["rewards"], G),
        mask=grouped(released_mask(raw), G),
        old=None if raw["old_logps"] is None else grouped(raw["old_logps"], G),
        reward_mask=None,
        settings=settings,
    )


def estimator(settings: Settings) -> Naive | Jackknife:
    """The estimator of the settings, never falling back."""
    return Jackknife(max_weight=None) if settings.jackknife else Naive()


def build_frpo(settings: Settings) -> FRPO:
    return FRPO(
        lam=settings.lam,
        estimator=estimator(settings),
        baseline=settings.baseline,
        clip_low=settings.low,
        clip_high=settings.high,
        ratio=settings.level,
        clip=settings.clip,
    )


def build_grpo(settings: Settings, scale_rewards: bool = False) -> GRPO:
    return GRPO(clip_low=settings.low, clip_high=settings.high, ratio=settings.level, scale_rewards=scale_rewards)


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    """The arguments of an objective; ``logps`` requires a gradient."""
    return {
        "logps": torch.tensor(case.logps, dtype=dtype, requires_grad=True),
        "rewards": torch.tensor(case.rewards, dtype=dtype),
        "mask": torch.tensor(case.mask),
        "old_logps": None if case.old is None else torch.tensor(case.old, dtype=dtype),
        "reward_mask": None if case.reward_mask is None else torch.tensor(case.reward_mask),
    }


def loss_and_gradient(objective: Objective, arguments: dict) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to ``logps``."""
    loss = objective(**arguments).loss
    (gradient,) = torch.autograd.grad(loss, arguments["logps"])
    return loss.detach(), gradient


OBJECTIVES = [
    FRPO(lam=0.4, estimator=Naive()),
    FRPO(lam=0.4, estimator=Jackknife(max_weight=None)),
    FRPO(lam=0.4, estimator=Jackknife(max_weight=None), clip="ppo", baseline=False),
    FRPO(lam=2.0, estimator=Jackknife(max_weight=None), ratio="sequence"),
    GRPO(),
    GRPO(ratio="sequence"),
]


def _label(objective: Objective) -> str:
    parts = [type(objective).__name__, objective.ratio]
    if isinstance(objective, FRPO):
        parts += [type(objective.estimator).__name__, objective.clip]
    return "-".join(parts)


every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=_label)


def arguments_for(seed: int, **kwargs) -> dict:
    """The arguments of an objective for a random case of 3 groups of 5, off-policy unless said."""
    return tensors(random_case(seed, Settings(), **{"P": 3, "G": 5, **kwargs}))
