"""Numbers that cannot be right: what is not finite, and what should be equal before the first update and is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Mean |log ratio| between the sampler's forward pass and the trainer's, which differ in shapes, cache and rounding.
# float32 stays near 1e-6; in 16-bit arithmetic a token's log-probability moves by hundredths.
RATIO_TOLERANCE = {False: 1e-3, True: 0.1}
# Mean KL per token between policy and reference before the first update. The two run the same weights.
KL_TOLERANCE = {False: 1e-5, True: 1e-2}


def check_coefficients(coefficients: Tensor, rewards: Tensor, ids: Sequence[str]) -> None:
    """Raise where the objective's coefficients [P, G] are not finite; ``ids`` name the P prompts."""
    bad = ~torch.isfinite(coefficients).all(-1)
    if bad.any():
        named = ", ".join(ids[i] for i in bad.nonzero().flatten().tolist())
        raise FloatingPointError(
            f"the loss of prompt(s) {named} is not finite (rewards {rewards[bad].tolist()}); the weights were not "
            "changed"
        )


def check_loss(loss: Tensor, kind: str, ids: Iterable[str]) -> None:
    """Raise where the loss of a micro-batch, a scalar, is not finite; ``ids`` name its rows, which are of ``kind``."""
    if not bool(torch.isfinite(loss)):
        named = ", ".join(dict.fromkeys(ids))
        raise FloatingPointError(
            f"the loss of a micro-batch with {kind}(s) {named} is {loss.item()}: the model's logits are not finite; "
            "the weights were not changed. Lower the learning rate, or use precision bf16-mixed or 32-true"
        )


def check_gradient(norm: Tensor) -> None:
    """Raise where the norm of the gradient over all trainable weights is not finite."""
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(
            f"the gradient norm is {norm.item()} though the loss is finite; the weights were not changed. Lower the "
            "learning rate, or use precision bf16-mixed or 32-true"
        )


def check_ratios(log_ratios: Tensor, *, half: bool) -> None:
    """On-policy every ratio of sampler and trainer is 1; ``log_ratios`` are those of all tokens."""
    worst, tolerance = log_ratios.abs().mean().item(), RATIO_TOLERANCE[half]
    if not worst <= tolerance:
        raise RuntimeError(
            "self-check before the first update: log-probabilities of the sampler and of the training pass differ by "
            f"{worst:.3g} per token, expected at most {tolerance}. The two must see one policy: look for a difference "
            "in masks, positions, dropout, temperature or precision between generation and training"
        )


def check_initial_kl(kl: Tensor, *, half: bool) -> None:
    """Before the first update policy and reference are one; ``kl`` is that of all tokens."""
    worst, tolerance = kl.abs().mean().item(), KL_TOLERANCE[half]
    if not worst <= tolerance:
        raise RuntimeError(
            f"self-check before the first update: KL to the reference is {worst:.3g} nats per token, expected at most "
            f"{tolerance}, since the policy starts at the reference. Look for a reference of other weights, precision "
            "or dropout"
        )
