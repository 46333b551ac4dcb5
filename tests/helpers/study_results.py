"""A study simulated from a known truth: what FRPO adds at equal reward and KL, and what a weaker constraint adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from frpo.report.results import StudyResults

ROLES = {
    "baseline": "GRPO, beta 0.05",
    "safety": "risky/safety",
    "helpfulness": "benign/helpfulness",
    "reward": "held_out/reward",
    "sampled": "sampled/reward",
    "kl_reference": "risky/kl/reference/sequence",
    "kl_start": "risky/kl/start/sequence",
    "tasks": {"comply": "benign/helpfulness", "arithmetic": "arithmetic/correct"},
    "retained_from": 40,
}
BETAS = (0.005, 0.02, 0.05, 0.2)
STEPS = (0, 40, 160)
CONDITIONS = tuple((task, lr) for task in ("comply", "arithmetic") for lr in (3e-4, 1e-3))
ROW_WISE = ("sample", "prompt_id", "value")
GRADES = np.array([0.0, 1 / 3, 2 / 3, 1.0])


@dataclass(frozen=True)
class Method:
    """A policy. ``strength`` (of the constraint) sets reward, KL and what is retained; ``effect`` adds to the last."""

    name: str
    family: str
    strength: float
    effect: float = 0.0
    lam: float = np.nan
    beta: float = np.nan
    scale: str | None = None
    estimator: str | None = None


def methods(effect: float = 0.0, weaker: float = 1.0, lambdas=(1.0, 0.3), scales=("objective", "loss")) -> list[Method]:
    """GRPO at four betas, and FRPO at beta 0.05 in both scales; ``weaker`` divides the constraint FRPO really has."""
    made = [Method("start", "base", 5.0)]
    made += [Method(f"GRPO, beta {b:g}", "GRPO", b, beta=b, scale="objective") for b in BETAS]
    for scale in scales:
        for lam in lambdas:
            strength = 0.05 / weaker * (lam if scale == "loss" else 1.0)
            name = f"FRPO jackknife, lambda {lam:g}, beta 0.05{' (loss)' if scale == 'loss' else ''}"
            made.append(Method(name, "FRPO", strength, effect, lam, 0.05, scale, "jackknife"))
    return made


def simulate(
    made: list[Method], seeds: int = 5, prompts: int = 12, samples: int = 8, spread: float = 0.03, rng_seed: int = 0
) -> StudyResults:
    """Results of ``made``. Retained safety falls by log strength and by what fine-tuning moves; seeds share a shift."""
    rng = np.random.default_rng(rng_seed)
    blocks = []
    for seed in range(seeds):
        shared = rng.normal(0, 2 * spread)
        for method in made:
            own = rng.normal(0, spread, 3)
            blocks += _policy(method, seed, own, prompts, samples, rng)
            for task, lr in CONDITIONS:
                for step in STEPS:
                    blocks += _downstream(method, seed, task, lr, step, shared + own[0], prompts, rng)
    counts = [len(block["value"]) for block in blocks]
    frame = pd.DataFrame([{k: v for k, v in block.items() if k not in ROW_WISE} for block in blocks])
    frame = frame.loc[np.repeat(frame.index, counts)].reset_index(drop=True)
    frame = frame.assign(**{name: np.concatenate([block[name] for block in blocks]) for name in ROW_WISE})
    return StudyResults(name="simulated", frame=frame, roles=dict(ROLES))


def level(method: Method) -> float:
    """Between 0 and 1: how far the constraint lets the reward rise. Linear in log strength."""
    return float(1 - (np.log(method.strength) - np.log(0.001)) / (np.log(10.0) - np.log(0.001)))


def true_retained(method: Method) -> float:
    """The retained safety without noise."""
    shift = np.mean([_moved(lr, step) for _, lr in CONDITIONS for step in STEPS if step >= ROLES["retained_from"]])
    return 0.3 + 0.6 * level(method) + method.effect - 0.1 * float(shift)


def _moved(lr: float, step: int) -> float:
    return float(lr / 1e-3 * np.log1p(step / 10))


def _policy(method: Method, seed: int, own: np.ndarray, prompts: int, samples: int, rng: np.random.Generator) -> list:
    x = level(method)
    values = {
        "risky/safety": 0.5 + 0.45 * x + 0.2 * own[1],
        "benign/helpfulness": 0.4 + 0.5 * x,
        "held_out/reward": 0.4 + 0.5 * x + 0.2 * own[1],
        "risky/kl/reference/sequence": 0.05 * np.exp(6 * x) * np.exp(own[2]),
        "unseen/safety": 0.4 + 0.45 * x + 0.2 * own[1],
        "arithmetic/correct": 0.1,
    }
    blocks = [_block(method, seed, "", np.nan, 0, name, value, prompts, rng) for name, value in values.items()]
    rewards = GRADES[rng.binomial(3, np.clip(0.3 + 0.6 * x, 0, 1), size=(prompts, samples))]
    ids = np.repeat(np.arange(prompts), samples)
    drawn = _rows(method, seed, "", np.nan, 0, "sampled/reward", ids, rewards.ravel())
    drawn |= {"sample": np.tile(np.arange(samples), prompts)}
    return [*blocks, drawn]


def _downstream(method, seed, task, lr, step, shift, prompts, rng) -> list:
    x, moved = level(method), _moved(lr, step)
    kept = 0.3 + 0.6 * x + method.effect - 0.1 * moved + shift
    values = {
        "risky/safety": kept,
        "unseen/safety": kept - 0.08,
        "benign/helpfulness": 0.4 + 0.5 * x + 0.02 * moved,
        "held_out/reward": 0.7 * kept + 0.2,
        "risky/kl/start/sequence": 0.4 * moved,
        "arithmetic/correct": 0.1 + 0.15 * moved,
    }
    return [_block(method, seed, task, lr, step, name, value, prompts, rng) for name, value in values.items()]


def _block(method, seed, task, lr, step, name, mean, prompts, rng) -> dict[str, object]:
    noise = rng.normal(0, 0.05, prompts)
    return _rows(method, seed, task, lr, step, name, np.arange(prompts), mean * (1 + noise - noise.mean()))


def _rows(method, seed, task, lr, step, name, ids, values) -> dict[str, object]:
    suite, _, quantity = name.partition("/")
    return {
        "method": method.name,
        "family": method.family,
        "method.lambda": method.lam,
        "method.beta": method.beta,
        "method.beta_scale": method.scale,
        "method.estimator": method.estimator,
        "seed": seed,
        "task": task,
        "downstream.lr": lr,
        "step": step,
        "suite": suite,
        "quantity": quantity,
        "status": "value",
        "sample": np.zeros(len(ids), dtype=int),
        "prompt_id": np.array([f"{suite}-{i}" for i in ids], dtype=object),
        "value": values,
    }
