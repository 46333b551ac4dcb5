"""An independent oracle: the equations of the method as plain float64 loops, without torch.

Written from the equations alone and kept apart from the package on purpose: every function here is the slow,
literal reading of one formula, so that an agreement with the package means something. Nothing is vectorised,
nothing is in log space unless the formula is, and gradients are finite differences.

Axes: ``P`` prompts, ``G`` completions a prompt, ``T`` tokens. Tensors are nested lists; masks are True where
something counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext

Row = list[float]
Matrix = list[list[float]]
Cube = list[list[list[float]]]


# --- Clipped ratios


def clipped(ratio: float, low: float, high: float) -> float:
    return max(1.0 - low, min(1.0 + high, ratio))


def surrogate(logps: Row, old: Row, mask: Sequence[bool], *, level: str, low: float, high: float, side: str) -> float:
    """a_i of one completion; ``side`` is "min" or "max" of the ratio and the clipped ratio."""
    pick = {"min": min, "max": max}[side]
    logs = [new - was for new, was, keep in zip(logps, old, mask, strict=True) if keep]
    if level == "sequence":
        ratio = math.exp(sum(logs) / len(logs))
        return pick(ratio, clipped(ratio, low, high))
    return sum(pick(math.exp(x), clipped(math.exp(x), low, high)) for x in logs) / len(logs)


# --- The log of a mean


def naive_log_mean(u: Row) -> float:
    return math.log(sum(u) / len(u))


def jackknife_log_mean(u: Row) -> float:
    size = len(u)
    left_out = [sum(u[j] for j in range(size) if j != i) / (size - 1) for i in range(size)]
    return size * naive_log_mean(u) - (size - 1) / size * sum(math.log(z) for z in left_out)


def exact_log_mean(log_u: Row, *, jackknife: bool, digits: int = 60) -> float:
    """The same two estimators from the logarithms, in decimals: exp(1e4) is an ordinary number there."""
    with localcontext() as context:
        context.prec = digits
        context.Emax, context.Emin = 10**8, -(10**8)
        u = [Decimal(x).exp() for x in log_u]
        size = len(u)
        whole = (sum(u) / size).ln()
        if not jackknife:
            return float(whole)
        parts = [(sum(u[j] for j in range(size) if j != i) / (size - 1)).ln() for i in range(size)]
        return float(size * whole - Decimal(size - 1) / size * sum(parts))


# --- Objectives


@dataclass(frozen=True)
class Settings:
    """What FRPO is configured with, in the words of the method."""

    lam: float = 1.0
    jackknife: bool = True
    baseline: bool = True
    low: float = 0.2
    high: float = 0.2
    level: str = "token"
    clip: str = "reference"


def advantages(rewards: Row) -> Row:
    mean = sum(rewards) / len(rewards)
    return [r - mean for r in rewards]


def on_policy_coefficients(rewards: Row, settings: Settings) -> Row:
    """c_i of the closed form, without max(lambda, 1) and without the mean over prompts."""
    size = len(rewards)
    w = [math.exp(-a / settings.lam) for a in advantages(rewards)]
    total = sum(w)
    minus = 1 / size if settings.baseline else 0.0
    if not settings.jackknife:
        return [w_i / total - minus for w_i in w]
    return [
        size * w[i] / total - (size - 1) / size * w[i] * sum(1 / (total - w[j]) for j in range(size) if j != i) - minus
        for i in range(size)
    ]


def group_loss(a: Row, rewards: Row, settings: Settings) -> float:
    """L of one group as a function of the clipped ratios a_i."""
    u = [math.exp(-x / settings.lam) * a_i for x, a_i in zip(advantages(rewards), a, strict=True)]
    value = jackknife_log_mean(u) if settings.jackknife else naive_log_mean(u)
    return value - sum(a) / len(a) if settings.baseline else value


def valid_groups(reward_mask: list[list[bool]] | None, P: int, G: int) -> Iterator[tuple[int, list[int]]]:
    """The groups with at least two judged completions, and the places of those."""
    for p in range(P):
        kept = [g for g in range(G) if reward_mask is None or reward_mask[p][g]]
        if len(kept) >= 2:
            yield p, kept


def frpo_loss(
    logps: Cube,
    rewards: Matrix,
    mask: list[list[list[bool]]],
    old: Cube,
    reward_mask: list[list[bool]] | None,
    settings: Settings,
) -> float:
    """max(lambda, 1) times the mean of L over the groups that are left."""
    values = []
    for p, kept in valid_groups(reward_mask, len(rewards), len(rewards[0])):
        group = [rewards[p][g] for g in kept]
        signs = on_policy_coefficients(group, settings)
        a = [
            surrogate(
                logps[p][g],
                old[p][g],
                mask[p][g],
                level=settings.level,
                low=settings.low,
                high=settings.high,
                side="max" if settings.clip == "ppo" and sign > 0 else "min",
            )
            for g, sign in zip(kept, signs, strict=True)
        ]
        values.append(group_loss(a, group, settings))
    return max(settings.lam, 1.0) * sum(values) / len(values) if values else 0.0


def frpo_loss_of_ratios(a: Matrix, rewards: Matrix, reward_mask: list[list[bool]] | None, settings: Settings) -> float:
    """The same loss as a function of the matrix a_i."""
    values = [
        group_loss([a[p][g] for g in kept], [rewards[p][g] for g in kept], settings)
        for p, kept in valid_groups(reward_mask, len(rewards), len(rewards[0]))
    ]
    return max(settings.lam, 1.0) * sum(values) / len(values) if values else 0.0


def grpo_loss(
    logps: Cube,
    rewards: Matrix,
    mask: list[list[list[bool]]],
    old: Cube,
    reward_mask: list[list[bool]] | None,
    settings: Settings,
) -> float:
    """Minus the mean over groups of the mean over completions of the pessimistic A_i s_i."""
    values = []
    for p, kept in valid_groups(reward_mask, len(rewards), len(rewards[0])):
        total = 0.0
        for g, advantage in zip(kept, advantages([rewards[p][g] for g in kept]), strict=True):
            logs = [n - o for n, o, m in zip(logps[p][g], old[p][g], mask[p][g], strict=True) if m]
            if settings.level == "sequence":
                logs = [sum(logs) / len(logs)]
            terms = [
                min(
                    math.exp(x) * advantage,
                    clipped(math.exp(x), settings.low, settings.high) * advantage,
                )
                for x in logs
            ]
            total += sum(terms) / len(terms)
        values.append(-total / len(kept))
    return sum(values) / len(values) if values else 0.0


# --- KL


def k1(logp: float, ref_logp: float) -> float:
    return -(ref_logp - logp)


def k2(logp: float, ref_logp: float) -> float:
    return (ref_logp - logp) ** 2 / 2


def k3(logp: float, ref_logp: float) -> float:
    x = ref_logp - logp
    return math.exp(x) - x - 1


def log_softmax(logits: Row) -> Row:
    top = max(logits)
    norm = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - norm for x in logits]


def full_kl(logits: Row, ref_logits: Row) -> float:
    policy, reference = log_softmax(logits), log_softmax(ref_logits)
    return sum(math.exp(a) * (a - b) for a, b in zip(policy, reference, strict=True))


def k3_penalty(logps: Matrix, ref_logps: Matrix, mask: list[list[bool]]) -> float:
    """Mean over rows of the mean over the tokens of a row."""
    rows = []
    for row, ref, keep in zip(logps, ref_logps, mask, strict=True):
        values = [k3(a, b) for a, b, m in zip(row, ref, keep, strict=True) if m]
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


# --- The worst case


def entropic_risk(rewards: Row, lam: float) -> float:
    low = min(rewards)
    return low - lam * math.log(sum(math.exp(-(r - low) / lam) for r in rewards) / len(rewards))


def tilted(rewards: Row, lam: float) -> Row:
    low = min(rewards)
    w = [math.exp(-(r - low) / lam) for r in rewards]
    return [x / sum(w) for x in w]


def kl_to_uniform(q: Row) -> float:
    return sum(x * math.log(x * len(q)) for x in q if x > 0)


def dual_value(groups: Matrix, lam: float, rho: float) -> float:
    """The dual of one multiplier shared by all groups (one group: the ordinary dual)."""
    return sum(entropic_risk(rewards, lam) for rewards in groups) / len(groups) - lam * rho


def solve_dual(groups: Matrix, rho: float) -> tuple[float, float]:
    """(value, lambda) of the dual by a scan on a logarithmic grid and golden-section refinement."""

    def value(log_lam: float) -> float:
        return dual_value(groups, math.exp(log_lam), rho)

    scan = [math.log(1e-5) + i * (math.log(1e5) - math.log(1e-5)) / 600 for i in range(601)]
    best = max(range(len(scan)), key=lambda i: value(scan[i]))
    left, right = scan[max(best - 1, 0)], scan[min(best + 1, 600)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(90):
        a, b = right - golden * (right - left), left + golden * (right - left)
        if value(a) >= value(b):
            right = b
        else:
            left = a
    middle = (left + right) / 2
    limit = sum(min(rewards) for rewards in groups) / len(groups)
    return (limit, 0.0) if limit >= value(middle) else (value(middle), math.exp(middle))


def worst_case_primal(rewards: Row, rho: float) -> tuple[float, float]:
    """(E_Q r, lambda) of the worst Q with KL(Q || uniform) = rho, by bisection on the tilt, without the dual."""
    lowest = min(rewards)
    if rho >= math.log(len(rewards) / sum(r == lowest for r in rewards)):
        return lowest, 0.0
    left, right = math.log(1e-6), math.log(1e9)
    for _ in range(200):
        middle = (left + right) / 2
        if kl_to_uniform(tilted(rewards, math.exp(middle))) > rho:
            left = middle
        else:
            right = middle
    lam = math.exp((left + right) / 2)
    return sum(q * r for q, r in zip(tilted(rewards, lam), rewards, strict=True)), lam


# --- Schedules


def warmed(step: int, start: float, warmup: int) -> float | None:
    return start * step / warmup if step < warmup else None


def linear(step: int, start: float, end: float, steps: int, warmup: int) -> float:
    warm = warmed(step, start, warmup)
    if warm is not None:
        return warm
    if step >= steps:
        return end
    return start + (end - start) * (step - warmup) / (steps - warmup)


def cosine(step: int, start: float, end: float, steps: int, warmup: int) -> float:
    warm = warmed(step, start, warmup)
    if warm is not None:
        return warm
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def ziegler(beta: float, kls: Row, target: float, gain: float) -> float:
    for kl in kls:
        beta *= 1 + gain * max(-0.2, min(0.2, kl / target - 1))
    return beta


# --- Derivatives and expectations


def finite_difference(function: Callable[[Row], float], point: Row, step: float = 2e-4) -> Row:
    """Central differences of fourth order: error about step^4, rounding about 1e-16/step.

    The step keeps 2 * step below 4.6e-4, the closest that a ratio of the reference cases comes to a corner of
    the clip.
    """
    gradient = []
    for i in range(len(point)):

        def along(h: float, i: int = i) -> float:
            return function([x + h if j == i else x for j, x in enumerate(point)])

        near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
        gradient.append((8 * near - far) / (12 * step))
    return gradient


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to spread ``total`` draws over ``parts`` outcomes."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def multinomial(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    log = math.lgamma(sum(counts) + 1)
    for count, probability in zip(counts, probabilities, strict=True):
        log += count * math.log(probability) - math.lgamma(count + 1)
    return math.exp(log)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x."""
    lx, ly = [math.log(v) for v in x], [math.log(v) for v in y]
    mx, my = sum(lx) / len(lx), sum(ly) / len(ly)
    top = sum((a - mx) * (b - my) for a, b in zip(lx, ly, strict=True))
    return top / sum((a - mx) ** 2 for a in lx)
