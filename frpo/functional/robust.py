"""The inner problem of FRPO: the worst policy within a KL budget, over a sample of rewards.

arXiv 2602.08813, section 3. For rewards r_1..r_G of completions drawn from pi (the empirical distribution of a group),
by duality (Donsker and Varadhan 1983):

    min_Q  E_Q[r] + lambda KL(Q || pi)  =  -lambda log E_pi exp(-r / lambda)         (entropic risk)
    min { E_Q[r] : KL(Q || pi) <= rho } =  max_lambda  -lambda log E_pi exp(-r / lambda) - lambda rho

Both minima are attained at Q_lambda(i) ~ exp(-r_i / lambda). The dual has its maximum at the lambda where
KL(Q_lambda || pi) = rho.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frpo.functional.logspace import log_mean_exp

# Halvings of the bracket of log lambda: from a width of a few hundred at most to less than float64 can tell apart.
BISECTIONS = 64


def tilted_weights(rewards: Tensor, lam: float | Tensor, dim: int = -1) -> Tensor:
    """Weights of the worst-case policy, ``exp(-r_i/lambda) / sum_j exp(-r_j/lambda)``: same shape as ``rewards``.

    >>> tilted_weights(torch.tensor([0.0, 1.0]), lam=1.0)
    tensor([0.7311, 0.2689])
    """
    return (-rewards / _positive(lam)).softmax(dim)


def entropic_risk(rewards: Tensor, lam: float | Tensor, dim: int = -1) -> Tensor:
    """``-lambda log mean_i exp(-r_i / lambda)`` along ``dim``.

    Between the minimum (lambda -> 0) and the mean (lambda -> infinity) of the rewards. As an estimate for the policy
    that was sampled it is too high by O(1/G): see :mod:`frpo.estimators`.

    >>> rewards = torch.tensor([0.0, 1.0])
    >>> [round(entropic_risk(rewards, lam).item(), 3) for lam in (0.01, 1.0, 100.0)]
    [0.007, 0.38, 0.499]
    """
    lam = _positive(lam)
    return -lam * log_mean_exp(-rewards / lam, dim)


def solve_lambda(rewards: Tensor, rho: float, mask: Tensor | None = None) -> Tensor:
    """The multiplier lambda of the KL budget ``rho`` (nats), one per row: [..., G] -> float64 [...].

    The maximiser of the dual, found by bisection: KL(Q_lambda || pi) falls as lambda grows, and equals rho there. It is
    0 where the budget is enough to reach the minimum reward: rho >= log(G / number of minima), which includes equal
    rewards. ``mask`` (bool [..., G]) says which rewards count; a row of none gives 0.

    >>> rewards = torch.tensor([0.0, 0.5, 1.0])
    >>> lam = solve_lambda(rewards, rho=0.2)
    >>> weights = tilted_weights(rewards.double(), lam)
    >>> round((weights * (weights * 3).log()).sum().item(), 6)  # the KL of the worst case to uniform: the budget
    0.2
    """
    log_p, r = _log_prior(rewards, mask)
    return _bisect(r, log_p, _budget(rho), shared=False)


def solve_shared_lambda(rewards: Tensor, rho: float, mask: Tensor | None = None) -> Tensor:
    """One lambda for all rows, where the *mean* KL over the rows is ``rho``: [P, G] -> float64 scalar.

    The multiplier of a budget on the average drift over prompts: the maximiser of the mean of the rows' duals. A row
    of equal rewards cannot drift, so the others may drift further.

    >>> graded = torch.tensor([[0.0, 0.5, 1.0]])
    >>> alone, shared = solve_lambda(graded, 0.2), solve_shared_lambda(torch.cat([graded, torch.ones(1, 3)]), 0.2)
    >>> bool(shared < alone)
    True
    """
    log_p, r = _log_prior(rewards, mask)
    keep = torch.isfinite(log_p).any(-1)
    if not bool(keep.any()):
        return torch.zeros((), dtype=torch.float64, device=rewards.device)
    return _bisect(r[keep], log_p[keep], _budget(rho), shared=True)


def worst_case_reward(rewards: Tensor, rho: float, mask: Tensor | None = None) -> Tensor:
    """``min { E_Q[r] : KL(Q || pi) <= rho }`` for each row of a sample of rewards: [..., G] -> float64 [...].

    Limits: the mean for rho -> 0, the minimum once rho >= log(G / number of minima). G rewards cannot tell budgets
    beyond log G apart. NaN for a row with no reward that counts.

    >>> rewards = torch.tensor([0.0, 0.5, 1.0])
    >>> [round(worst_case_reward(rewards, rho).item(), 3) for rho in (1e-6, 0.2, 2.0)]
    [0.499, 0.248, 0.0]
    """
    log_p, r = _log_prior(rewards, mask)
    lam = _bisect(r, log_p, _budget(rho), shared=False)
    safe = torch.where(lam > 0, lam, 1.0)
    q = (log_p - r / safe.unsqueeze(-1)).softmax(-1)
    lowest = r.masked_fill(~torch.isfinite(log_p), torch.inf).amin(-1)
    value = torch.where(lam > 0, (q * r).sum(-1), lowest)
    return torch.where(torch.isfinite(log_p).any(-1), value, torch.nan)


def _bisect(r: Tensor, log_p: Tensor, rho: float, *, shared: bool) -> Tensor:
    counts = torch.isfinite(log_p)
    lowest = r.masked_fill(~counts, torch.inf).amin(-1, keepdim=True)
    spread = (r.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True) - lowest).nan_to_num(0.0, 0.0, 0.0)
    above = torch.where(counts & (r > lowest), r - lowest, torch.inf).amin(-1, keepdim=True)
    minima = (log_p.exp() * (r == lowest)).sum(-1)
    limit = -torch.log(minima.clamp(min=torch.finfo(r.dtype).tiny))
    if shared:
        limit, spread, above = limit.mean(), spread.max(), above.min()
    else:
        spread, above = spread.squeeze(-1), above.squeeze(-1)
    reachable = (limit > rho) & (spread > 0)
    # KL(Q_lambda || pi) <= spread^2 / (8 lambda^2) bounds the root from above, and lambda = above/1000, where all mass
    # is on the minima, from below.
    high = torch.where(reachable, spread / (8 * rho) ** 0.5, 1.0).log()
    low = torch.where(reachable, torch.minimum(above / 1000, high.exp() / 2), 0.5).log()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        lam = middle.exp()
        log_q = (log_p - r / lam.unsqueeze(-1)).log_softmax(-1)
        gap = torch.where(counts, log_q - log_p, 0)
        kl = (log_q.exp() * gap).nan_to_num(0.0).sum(-1)
        too_far = (kl.mean() if shared else kl) > rho
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
    return torch.where(reachable, ((low + high) / 2).exp(), 0.0)


def _log_prior(rewards: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    r = rewards.to(torch.float64)
    if mask is None:
        mask = torch.ones_like(r, dtype=torch.bool)
    if mask.shape != r.shape:
        raise ValueError(f"got rewards {tuple(r.shape)} and mask {tuple(mask.shape)}, expected one shape")
    n = mask.sum(-1, keepdim=True).clamp(min=1).to(r.dtype)
    return torch.where(mask, -n.log(), -torch.inf), torch.where(mask, r, 0.0)


def _budget(rho: float) -> float:
    if not rho > 0:
        raise ValueError(f"rho is the KL budget in nats and must be > 0, got {rho}; write 0.5 or 1.0, say")
    return float(rho)


def _positive(lam: float | Tensor) -> float | Tensor:
    smallest = lam.min().item() if isinstance(lam, Tensor) else lam
    if not smallest > 0:
        raise ValueError(f"lambda must be > 0, got {lam}; small values look at the worst completion, large at the mean")
    return lam
