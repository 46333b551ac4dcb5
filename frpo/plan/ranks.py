"""How a strategy spreads a training step over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from torch import nn

from frpo.modules.strategy import check_fsdp1
from frpo.plan.plan import size


@dataclass(frozen=True)
class Ranks:
    """Into how many parts weights, gradients and optimiser states are cut, and what stands beside them.

    ``buckets``: gradients are reduced from a copy of their own. ``gathers``: cut weights are put together again, for a
    layer at a time in an update and whole while completions are drawn. ``flat``: the gradient is that of all weights,
    frozen ones included.
    """

    name: str
    number: int
    weights: int = 1
    gradients: int = 1
    states: int = 1
    buckets: bool = False
    gathers: bool = False
    flat: bool = False


def read_ranks(strategy: Any, devices: Any, nodes: int, *, gpu: bool) -> Ranks:
    """The ranks of a Trainer's ``strategy`` (a name or an object), ``devices`` and ``num_nodes``."""
    number = _devices(devices, gpu) * nodes
    if strategy == "auto":
        strategy = "ddp" if number > 1 else SingleDeviceStrategy()
    if isinstance(strategy, str):
        if strategy not in StrategyRegistry:
            raise ValueError(
                f"trainer.strategy: got {strategy!r}, expected one of {', '.join(sorted(StrategyRegistry))}"
            )
        strategy = StrategyRegistry.get(strategy)
    if isinstance(strategy, SingleDeviceStrategy):
        return Ranks("one process", 1)
    if isinstance(strategy, DDPStrategy):
        copies = not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
        return Ranks(f"DDP on {number} rank(s)", number, buckets=copies)
    if isinstance(strategy, FSDPStrategy):
        check_fsdp1(strategy)
        sharding = strategy.sharding_strategy.name
        kept = number if sharding == "FULL_SHARD" else 1
        name = f"FSDP1, {sharding}, on {number} rank(s)"
        return Ranks(name, number, kept, number, number, gathers=kept > 1, flat=True)
    if isinstance(strategy, ModelParallelStrategy):
        return Ranks(f"FSDP2 on {number} rank(s)", number, number, number, number, gathers=True)
    raise ValueError(
        f"trainer.strategy: got {type(strategy).__name__}; memory is planned for a single device, ddp, fsdp and "
        "model_parallel"
    )


def gathered(model: nn.Module) -> int:
    """Bytes of weights put together at once where they are cut: the largest layer, and all that is in no layer."""
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = size(parameter for parameter in model.parameters() if id(parameter) not in inside)
    return outside + max((size(layer.parameters()) for layer in layers), default=0)


def _devices(devices: Any, gpu: bool) -> int:
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) if gpu else 1
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part.strip()]
    return len(devices) if isinstance(devices, list | tuple) else int(devices)
