"""Whether a model keeps the demonstrations of a packed row apart: asked of its settings, then of the model itself."""

from __future__ import annotations

from typing import Any

import torch

from frpo.modules.numerics import RATIO_TOLERANCE

IMPLEMENTATIONS = ("sdpa", "eager")
"""Attention whose mask transformers builds from the positions of a row."""
PROBE_TOKENS = 8
"""Length of the sequences on which a model is tried."""


def check_attention(model: Any) -> None:
    """Raise ``ValueError`` where the attention is not one of ``IMPLEMENTATIONS``."""
    found = model.config._attn_implementation
    if found not in IMPLEMENTATIONS:
        raise ValueError(
            f"packing: the policy's attention is {found!r}, expected {' or '.join(IMPLEMENTATIONS)}, which keep the "
            "demonstrations of a row apart; write policy.init_args.attn_implementation: sdpa, or "
            "data.init_args.packing: false"
        )


def check_apart(model: Any) -> None:
    """Raise ``ValueError`` where a sequence behind another in its row is not what it is alone. Two forward passes.

    Finds layers that no mask reaches, such as convolutions and recurrences over the row.
    """
    device = next(model.parameters()).device
    alone, positions = torch.arange(2, 2 + PROBE_TOKENS, device=device), torch.arange(PROBE_TOKENS, device=device)
    training = model.training
    model.eval()  # an adapter's dropout would tell the two apart
    with torch.no_grad():
        single = _logps(model, alone, positions)
        packed = _logps(model, torch.cat([alone.flip(0), alone]), positions.repeat(2))[PROBE_TOKENS:]
    model.train(training)
    half = packed.dtype in (torch.bfloat16, torch.float16)
    worst, tolerance = (packed - single).float().abs().gather(-1, alone[:, None]).mean().item(), RATIO_TOLERANCE[half]
    if not worst <= tolerance:
        raise ValueError(
            f"packing: log-probabilities of a sequence that is the second of its row differ by {worst:.3g} a token "
            f"from those it has alone, expected at most {tolerance}: layers of {type(model).__name__} mix the "
            "sequences of a row; write data.init_args.packing: false"
        )


def _logps(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after each token of one row, [S, V]: the second of two rows, as a batch has several."""
    out = model(input_ids=ids.repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False)
    logps: torch.Tensor = out.logits[1].log_softmax(-1)
    return logps
