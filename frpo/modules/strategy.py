"""What a strategy and a precision allow: settings that would train something else, or were never tried, are refused."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities import rank_zero_warn


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy cuts weights over ranks."""
    return isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)


def check_strategy(trainer: Trainer) -> None:
    """Raise ``ValueError`` under a strategy that would train something else, or twice."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy | XLAStrategy):  # these two call themselves DDP
        raise ValueError(
            f"Trainer.strategy: got {type(strategy).__name__}, expected a single device, DDPStrategy, FSDPStrategy or "
            "ModelParallelStrategy; see conf/trainer"
        )
    if type(precision) is not Precision and not isinstance(
        precision, MixedPrecision | HalfPrecision | DoublePrecision | FSDPPrecision
    ):
        raise ValueError(
            f"Trainer(plugins=...): got {type(precision).__name__}, expected none for the precision; write "
            "trainer.precision: bf16-mixed or 32-true"
        )
    if isinstance(strategy, FSDPStrategy):
        check_fsdp1(strategy)
        _check_fsdp1_precision(str(trainer.precision))
    if isinstance(strategy, ModelParallelStrategy):
        _check_fsdp2(strategy, trainer.world_size)


def check_fsdp1(strategy: FSDPStrategy) -> None:
    """Raise ``ValueError`` for settings of FSDP1 that nobody has seen train the same."""
    cut, kept = strategy.sharding_strategy.name, strategy._state_dict_type
    own_layers = "auto_wrap_policy" in strategy.kwargs
    recomputes = bool(strategy._activation_checkpointing_kwargs)
    found = {
        "sharding_strategy": (cut, "FULL_SHARD or SHARD_GRAD_OP", cut in ("FULL_SHARD", "SHARD_GRAD_OP")),
        "state_dict_type": (kept, "full: one file, which any strategy resumes and `frpo export` reads", kept == "full"),
        "cpu_offload": (True, "false", not strategy.cpu_offload.offload_params),
        "mixed_precision": (strategy.mixed_precision, "null with trainer.precision: bf16-mixed",
                            strategy.mixed_precision is None),
        "auto_wrap_policy": ("one", "null: the layers that the model names are cut", not own_layers),
        "activation_checkpointing_policy": ("one", "null with policy.init_args.gradient_checkpointing: true",
                                            not recomputes),
    }  # fmt: skip
    for name, (got, expected, right) in found.items():
        if not right:
            raise ValueError(f"FSDPStrategy.{name}: got {got}, expected {expected}; see conf/trainer/fsdp.yaml")


def _check_fsdp1_precision(precision: str) -> None:
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"Trainer.precision: got {precision} with FSDPStrategy, expected bf16-mixed or 32-true; or write `include: "
            "[conf/trainer/fsdp2.yaml]`"
        )


def _check_fsdp2(strategy: ModelParallelStrategy, world_size: int) -> None:
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy.tensor_parallel_size: got {size}, expected 1: the weights are sharded over data "
            f"parallel ranks alone. Write tensor_parallel_size: 1 and data_parallel_size: {world_size}"
        )
    if strategy._save_distributed_checkpoint:
        raise ValueError(
            "ModelParallelStrategy.save_distributed_checkpoint: got true, which writes a folder that a kill leaves in "
            "part and `frpo export` cannot read; write save_distributed_checkpoint: false, for one file that any "
            "strategy resumes"
        )


def check_unsharded(trainer: Trainer, why: str) -> None:
    """Raise ``ValueError`` where the strategy cuts weights; ``why`` says what needs them whole."""
    if is_sharded(trainer):
        raise ValueError(
            f"Trainer.strategy: got {type(trainer.strategy).__name__}, which shards weights, expected one that keeps "
            f"them whole: {why}; or write trainer.strategy: ddp"
        )


def check_whole_evaluation(trainer: Trainer) -> None:
    """Refuse FSDP1, under which Lightning would cut the weights and run the evaluation beside them."""
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            "FSDPStrategy: a policy is evaluated with its whole weights on every rank; write trainer.strategy: ddp"
        )


def check_flat_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that goes by the shapes of weights under FSDP1, which does not keep them."""
    if len(optimizer.param_groups) > 1 or isinstance(optimizer, torch.optim.Adafactor):
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__} with {len(optimizer.param_groups)} groups of weights under "
            "FSDPStrategy, which hands it pieces in one dimension: what goes by a weight's shape would be another "
            "method. Write one group and an element-wise optimizer such as torch.optim.AdamW, or `include: "
            "[conf/trainer/fsdp2.yaml]`"
        )


def check_precision(trainer: Trainer) -> None:
    """Refuse a precision that does not fit several backward passes per step; warn of one that trains in half."""
    precision = str(trainer.precision)
    if precision in ("bf16-true", "16-true"):
        rank_zero_warn(
            f"Trainer.precision: {precision} holds all that trains in half precision, an adapter too, where small "
            "updates are rounded away: write bf16-mixed, and policy.init_args.dtype: bfloat16 for a frozen base"
        )
    if precision == "16-mixed":
        raise ValueError(
            "Trainer.precision: got 16-mixed, whose loss scaling does not fit several backward passes per step; write "
            "bf16-mixed"
        )
