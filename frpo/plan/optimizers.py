"""What an optimiser keeps: asked of the optimiser itself, on a parameter small enough to step for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frpo.plan.tracing import LiveBytes

# Two sizes that no optimiser has constants of, so that a state of this shape follows the parameter's.
ROWS, COLUMNS = 61, 67


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of the states after the first step, and of what a step allocates beside them."""

    name: str
    states: int
    per_element: float
    workspace: int


def optimizer_cost(build: Callable[[Any], Any], parameters: Sequence[nn.Parameter], *, at_once: bool) -> OptimizerCost:
    """What the optimiser that ``build`` makes keeps for ``parameters``, and what a step allocates.

    ``at_once``: a step handles all parameters together, as it does on a GPU, and not one after the other. A state
    follows the shape of its parameter as it does for the trial: whole, its rows, its columns, or a number.
    """
    kinds = {(parameter.dtype, parameter.dim() > 1) for parameter in parameters}
    trials = {kind: _trial(build, *kind) for kind in kinds}
    states = temporaries = largest = elements = 0
    name = type(build([nn.Parameter(torch.zeros(1))])).__name__
    for parameter in parameters:
        kept, temporary = trials[parameter.dtype, parameter.dim() > 1]
        states += sum(_like(parameter, state) * state.element_size() for state in kept)
        own = round(temporary * parameter.numel())
        temporaries, largest, elements = temporaries + own, max(largest, own), elements + parameter.numel()
    return OptimizerCost(name, states, states / max(elements, 1), temporaries if at_once else largest)


def _trial(build: Callable[[Any], Any], dtype: torch.dtype, is_matrix: bool) -> tuple[list[Tensor], float]:
    """The states of a parameter after a step, and the bytes per element that the next step allocates."""
    parameter = nn.Parameter(torch.zeros((ROWS, COLUMNS) if is_matrix else (ROWS,), dtype=dtype))
    optimizer = build([parameter])
    with LiveBytes([parameter]) as live:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        live.restart()
        before = live.now
        optimizer.step()
    kept = [state for state in optimizer.state[parameter].values() if isinstance(state, Tensor)]
    return kept, (live.peak - before) / parameter.numel()


def _like(parameter: Tensor, state: Tensor) -> int:
    """Elements of the state that stands to ``parameter`` as ``state`` does to the trial's."""
    rows = parameter.shape[0] if parameter.dim() else 1
    sizes = {ROWS: rows, COLUMNS: parameter.numel() // max(rows, 1)}
    return math.prod(sizes.get(length, length) for length in state.shape)
