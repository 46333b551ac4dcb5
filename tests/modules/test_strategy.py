"""Which settings of a strategy are refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.plugins.precision import MixedPrecision as Autocast
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from torch.distributed.fsdp import MixedPrecision
from torch.nn import Linear

from frpo.modules.strategy import check_strategy


def fsdp1(precision: str = "bf16-mixed", **settings: Any) -> Any:
    return SimpleNamespace(strategy=FSDPStrategy(**settings), precision=precision, precision_plugin=Precision())


def fsdp2(tensor_parallel: int, **settings: Any) -> Any:
    strategy = ModelParallelStrategy(**settings)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}
    return SimpleNamespace(strategy=strategy, world_size=8, precision_plugin=Precision())


def test_settings_that_train_the_same_policy_pass() -> None:
    for sharding in ("FULL_SHARD", "SHARD_GRAD_OP"):
        check_strategy(fsdp1(sharding_strategy=sharding))
    check_strategy(fsdp1("32-true"))
    check_strategy(fsdp2(1, save_distributed_checkpoint=False))


def test_what_nobody_has_seen_train_the_same_is_refused_whatever_its_name() -> None:
    other = SimpleNamespace(strategy=XLAStrategy.__new__(XLAStrategy), precision_plugin=Precision())
    with pytest.raises(ValueError, match="Trainer.strategy: got XLAStrategy, expected a single device, DDPStrategy"):
        check_strategy(other)
    plugged = SimpleNamespace(strategy=DDPStrategy(), precision_plugin=object.__new__(DeepSpeedPrecision))
    with pytest.raises(ValueError, match="got DeepSpeedPrecision, expected none for the precision"):
        check_strategy(plugged)
    check_strategy(SimpleNamespace(strategy=DDPStrategy(), precision_plugin=Autocast("bf16-mixed", "cpu")))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (lambda: fsdp1(sharding_strategy="NO_SHARD"), "sharding_strategy: got NO_SHARD, expected FULL_SHARD"),
        (lambda: fsdp1(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)), "sharding_strategy: got HYBRID_SHARD"),
        (lambda: fsdp1(state_dict_type="sharded"), "state_dict_type: got sharded, expected full"),
        (lambda: fsdp1(cpu_offload=True), "cpu_offload: got True, expected false"),
        (lambda: fsdp1(mixed_precision=MixedPrecision()), "mixed_precision: got .* trainer.precision: bf16-mixed"),
        (lambda: fsdp1(auto_wrap_policy={Linear}), "auto_wrap_policy: got one, expected null"),
        (lambda: fsdp1(activation_checkpointing_policy={Linear}), "null with policy.init_args.gradient_checkpointing"),
        (lambda: fsdp1("bf16-true"), r"got bf16-true with FSDPStrategy.*conf/trainer/fsdp2\.yaml"),
        (lambda: fsdp2(2, save_distributed_checkpoint=False), "tensor_parallel_size: got 2.* data_parallel_size: 8"),
        (lambda: fsdp2(1), "save_distributed_checkpoint: got true.* write save_distributed_checkpoint: false"),
    ],
)
def test_others_are_refused(trainer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_strategy(trainer())
