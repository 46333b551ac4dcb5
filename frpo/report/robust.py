"""Two checks on the study's own rewards: the estimators' bias, and the worst case that the trained policy predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frpo.estimators import Estimator, Jackknife, Naive
from frpo.functional.robust import worst_case_reward

GROUPS = (2, 4, 8, 16)
ESTIMATORS: dict[str, Estimator] = {"naive": Naive(), "jackknife": Jackknife()}
# Groups drawn in all, and the most distributions they are shared by: errors below most biases shown, within seconds.
DRAWS, DISTRIBUTIONS = 60_000, 100
BUDGETS = 24
# Budgets up to this share of log S: at log S itself the worst case is the worst sample.
LARGEST_BUDGET = 0.98


@dataclass(frozen=True)
class Rewards:
    """Distinct reward distributions, sorted: ``values`` [n, S], and how many prompts have each, ``weights`` [n].

    ``left_out`` prompts had fewer than S rewards, a failed judgement among them.
    """

    values: Tensor
    weights: Tensor
    left_out: int

    @property
    def samples(self) -> int:
        """S, samples per prompt."""
        return self.values.shape[-1]


def distributions(table: pd.DataFrame) -> Rewards | None:
    """The distinct rows of rewards (one row per prompt, one column per sample), or None with fewer than two samples."""
    values = table.to_numpy(dtype=float)
    full = np.sort(values[np.isfinite(values).all(axis=1)], axis=1)
    if values.ndim < 2 or values.shape[1] < 2 or not len(full):
        return None
    distinct, counts = np.unique(full, axis=0, return_counts=True)
    return Rewards(torch.from_numpy(distinct), torch.from_numpy(counts).double(), len(values) - len(full))


def bias_study(rewards: Rewards, lambdas: Sequence[float]) -> pd.DataFrame:
    """Bias of each estimator of ``log E exp(-r/lambda)`` at each group size, with a prompt's samples as the truth.

    Groups are drawn with replacement from the samples of a prompt; the bias is the mean estimate minus
    ``log mean exp(-r/lambda)``, averaged over prompts. The part of an estimate that is linear in u has mean zero and is
    subtracted, which leaves the mean and removes most of the Monte Carlo error (a control variate). No rows where no
    prompt's rewards differ. One row per ``estimator``, ``lambda`` and ``group``: ``bias`` and its Monte Carlo ``error``
    (one standard error), in nats.
    """
    generator = torch.Generator().manual_seed(0)
    values, weights = _varied(rewards, generator)
    if not len(values):
        return pd.DataFrame()
    share = float(weights.sum() / rewards.weights.sum())
    draws, rows = DRAWS // len(values), []
    for group in GROUPS:
        index = torch.randint(rewards.samples, (len(values), draws * group), generator=generator)
        for lam in lambdas:
            log_u = -values / lam
            truth = Naive().log_mean(log_u)
            drawn = log_u.gather(1, index).view(len(values), draws, group) - truth[:, None, None]
            linear = drawn.exp().mean(-1) - 1
            for name, estimator in ESTIMATORS.items():
                estimate = estimator.log_mean(drawn)
                slope = _slope(estimate, linear)
                rest = estimate - slope * linear
                mean = share * (weights * rest.mean(-1)).sum() / weights.sum()
                error = share * ((weights / weights.sum()) ** 2 * rest.var(-1) / draws).sum().sqrt()
                rows.append(
                    {"estimator": name, "lambda": lam, "group": group, "bias": float(mean), "error": float(error)}
                )
    return pd.DataFrame(rows, columns=["estimator", "lambda", "group", "bias", "error"])


def _varied(rewards: Rewards, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distributions that have a bias at all, at most DISTRIBUTIONS of them with the weight of all."""
    varied = rewards.values[:, 0] < rewards.values[:, -1]
    values, weights = rewards.values[varied], rewards.weights[varied]
    if len(values) <= DISTRIBUTIONS:
        return values, weights
    chosen = torch.multinomial(weights, DISTRIBUTIONS, replacement=True, generator=generator)
    return values[chosen], torch.full((DISTRIBUTIONS,), float(weights.sum()) / DISTRIBUTIONS, dtype=torch.float64)


def _slope(y: Tensor, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).sum(-1, keepdim=True)
    return (centred * y).sum(-1, keepdim=True) / variance.clamp(min=torch.finfo(x.dtype).tiny)


def decay(study: pd.DataFrame) -> pd.DataFrame:
    """The exponent a of |bias| ~ G^a over the group sizes whose bias is over twice its Monte Carlo error.

    One row per estimator and lambda: ``exponent``, NaN with fewer than two such sizes.
    """
    rows = []
    for (name, lam), part in study.groupby(["estimator", "lambda"], sort=False):
        seen = part[part["bias"].abs() > 2 * part["error"]]
        known = len(seen) > 1
        exponent = np.polyfit(np.log(seen["group"]), np.log(seen["bias"].abs()), 1)[0] if known else np.nan
        rows.append({"estimator": name, "lambda": lam, "exponent": float(exponent)})
    return pd.DataFrame(rows, columns=["estimator", "lambda", "exponent"])


def predicted_worst_case(table: pd.DataFrame) -> pd.DataFrame:
    """Worst-case reward within a KL budget rho on each prompt, from the policy's own samples.

    Args:
        table: rewards, rows (method, seed, prompt_id), one column per sample.

    Returns:
        Rows (method, seed), columns rho in nats up to just below log S: means over prompts. S rewards show no budget
        beyond log S. Prompts with fewer than S rewards are left out.
    """
    full = table.dropna()
    if full.empty or full.shape[1] < 2:
        return pd.DataFrame()
    distinct, inverse = np.unique(np.sort(full.to_numpy(dtype=float), axis=1), axis=0, return_inverse=True)
    largest = LARGEST_BUDGET * log(full.shape[1])
    budgets = [float(rho) for rho in np.geomspace(min(0.01, largest / 10), largest, BUDGETS)]
    values = np.stack([worst_case_reward(torch.from_numpy(distinct), rho).numpy() for rho in budgets], axis=1)
    by_prompt = pd.DataFrame(values[inverse.reshape(-1)], index=full.index, columns=budgets)
    return by_prompt.groupby(level=["method", "seed"]).mean()
