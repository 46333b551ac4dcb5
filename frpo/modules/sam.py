"""Sharpness-aware minimisation: the gradient of the worst weights nearby, taken from the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frpo.models.sharding import total_norm
from frpo.modules.numerics import check_gradient


@dataclass(frozen=True)
class SAM:
    """Steps along the gradient at ``w + radius g / ||g||``, where g is the gradient at w (arXiv 2010.01412, eq. 2).

    To first order that is the point of the largest loss within ``radius``, so what is descended is the loss of the
    worst neighbour: flat minima. It costs a second backward pass per step. Radius 0 would be plain descent.

    Args:
        radius: Euclidean length of the ascent over all trainable weights together, > 0 (rho in the paper).
    """

    radius: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(
                f"SAM.radius: got {self.radius}, expected a finite number > 0; leave `sam` out for no ascent at all"
            )

    def move_gradient(self, model: nn.Module, accumulate: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """Replace the gradients in place by those at the ascent point; return the norms before and after, scalars.

        ``accumulate`` adds the gradient of the loss at the present weights. Gradients must be whole on entry (averaged
        over ranks), so that every rank ascends to one point. Weights without a gradient do not move; where all
        gradients are 0 there is no direction and nothing changes. The weights are afterwards what they were, bit for
        bit. Raises ``FloatingPointError`` where the gradient is not finite.
        """
        moved = [p for p in model.parameters() if p.grad is not None]
        before = _norm(model)
        check_gradient(before)
        if before == 0:
            return before, before
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p in moved:
                assert p.grad is not None
                p.add_((p.grad * (self.radius / before)).to(p.dtype))
                p.grad = None
        try:
            accumulate()
        finally:
            with torch.no_grad():
                for p, value in zip(moved, kept, strict=True):
                    p.copy_(value)
        return before, _norm(model)


def _norm(model: nn.Module) -> Tensor:
    return total_norm(model, (p.grad for p in model.parameters() if p.grad is not None))
