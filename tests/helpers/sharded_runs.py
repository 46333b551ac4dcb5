"""Runs in one process, or in several under DDP, FSDP1 or FSDP2, shared by the tests of strategies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks
import lightning.pytorch.strategies.fsdp
import runs
import supervised_runs
import tampering
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.wrap import enable_wrap
from torch.distributed.tensor import DTensor

from frpo.data.module import RowsDataModule
from frpo.evaluation.callback import Evaluation
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled
from frpo.models.sharding import gathered
from frpo.modules.policy_module import PolicyModule
from frpo.objectives import FRPO
from frpo.penalty import KLPenalty
from frpo.run.checkpoint import Checkpoint
from frpo.schedules import AdaptiveKL, KLBudget

TIMEOUT = timedelta(seconds=60)


def _full_states(module: torch.nn.Module, world_size: int, rank0_only: bool = True) -> AbstractContextManager:
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses its own class without a GPU, and its context names a device by number.

    Moving a gathered weight to the CPU is how it is saved from the buffer it lies in; one that is there is lost.
    """

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        lightning.pytorch.strategies.fsdp._get_full_state_dict_context = _full_states
        options = {**self.kwargs, "sharding_strategy": self.sharding_strategy, "device_id": self.root_device}
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **options):
            yield


class KeepsTypes(FSDPPrecision):
    """Under FSDP1 alone, Lightning casts weights to float32 for 32-true."""

    def convert_module(self, module):
        return module


def strategy(kind: str, processes: int, gpu: bool) -> Strategy:
    if kind == "ddp":
        return DDPStrategy(timeout=TIMEOUT)
    if kind == "fsdp1":
        return FSDPStrategy(timeout=TIMEOUT) if gpu else FSDP1OnCPU(timeout=TIMEOUT)
    return ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=TIMEOUT
    )


class Keep(runs.L.Callback):
    """Metrics of every step, of the last validation, and the last weights whole, written by the process of rank 0."""

    def __init__(self, out: Path, kind: str) -> None:
        self.out, self.kind = out, kind
        self.rows: list[dict[str, float]] = []
        self.held_out: dict[str, float] = {}

    def on_train_start(self, trainer, module) -> None:
        if trainer.world_size > 1 and self.kind != "ddp":
            parameters = list(module.parameters())
            held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
            with gathered(module.policy_model, module.reference_model):
                assert held < 1.2 / trainer.world_size * sum(p.numel() for p in parameters)

    def on_train_batch_start(self, trainer, module, *args) -> None:
        """Ranks take different numbers of passes, on rows of different lengths."""
        with torch.no_grad(), gathered(module.policy_model):
            for _ in range(1 + trainer.global_rank):
                ids = torch.arange(2, 6 + trainer.global_rank, device=module.device)[None]
                module.policy_model(input_ids=ids)

    def on_train_batch_end(self, trainer, *args) -> None:
        metrics = trainer.callback_metrics.items()
        self.rows.append({k: float(v) for k, v in metrics if k.startswith("train/") and "seconds" not in k})

    def on_validation_end(self, trainer, module) -> None:
        self.held_out = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

    def on_train_end(self, trainer, module) -> None:
        weights = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in runs.weights(module).items()}
        if trainer.is_global_zero:
            whole = {name: value.cpu() for name, value in weights.items()}
            torch.save({"weights": whole, "rows": self.rows, "held_out": self.held_out}, self.out)


def full(model_dir: Path, **changes: Any) -> PolicyModule:
    """Every weight against a frozen copy; gradients are clipped, and ranks lose different numbers of groups."""
    arguments: dict[str, Any] = {
        "objective": FRPO(lam=0.5, clip="ppo"),
        "reward": runs.Graded(fail_every=3),
        "max_failure_rate": 1.0,
        "max_grad_norm": 0.05,
        "group_size": 3,
        "micro_batch_size": 2,
        "epochs_per_rollout": 2,
        "kl": KLPenalty(beta=AdaptiveKL(initial=0.1, target=0.01)),
        "lam_schedule": KLBudget(rho=0.3, window=16),
    }
    return runs.full(model_dir, **{**arguments, **changes})


def lora(model_dir: Path, **changes: Any) -> PolicyModule:
    """The same with an adapter, whose reference is the adapter switched off; rank 3 no two processes can share."""
    policy = Policy(str(model_dir), adapter=LoRA(r=3, alpha=6), dtype="float64", gradient_checkpointing=True)
    return full(model_dir, **{"policy": policy, "reference": AdapterDisabled(), **changes})


def prompts(batch_size: int) -> RowsDataModule:
    return runs.data(n=32, batch_size=batch_size, val=6)


def supervised(model_dir: Path, **changes: Any) -> PolicyModule:
    return supervised_runs.module(model_dir, **{"max_grad_norm": 0.05, **changes})


def demonstrations(batch_size: int) -> RowsDataModule:
    return supervised_runs.data(batch_size=batch_size, val=6)


def tamper(model_dir: Path, **changes: Any) -> PolicyModule:
    return tampering.module(model_dir, **changes)


def attacks(batch_size: int) -> RowsDataModule:
    return tampering.data(batch_size=batch_size // 2, attacks_per_step=1, val=tampering.Pairs(4))


def train(make, make_data, out: Path, processes: int, kind: str | None, options: dict[str, Any]) -> None:
    """One rank's run; ``options`` go to the Trainer, ``ckpt_path`` to fit, ``suites`` to Evaluation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = dict(options)
    gpu = options.get("accelerator") == "gpu"
    ckpt_path, suites = options.pop("ckpt_path", None), options.pop("suites", None)
    folder = out.with_suffix("")
    callbacks = [Keep(out, kind or ""), Checkpoint(str(folder), every_n_train_steps=2, save_top_k=-1)]
    if suites is not None:
        callbacks.append(Evaluation(str(folder), suites(8 // processes), every_n_train_steps=2, at_start=False))
    arguments: dict[str, Any] = {
        "devices": processes,
        "strategy": "auto" if kind is None else strategy(kind, processes, gpu),
        "max_steps": 2,
        "max_epochs": -1,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "enable_checkpointing": True,
        "callbacks": callbacks,
    }
    if kind == "fsdp1" and "precision" not in options:
        arguments["plugins"] = [KeepsTypes("32-true")]
    trainer = runs.trainer(out.parent, **{**arguments, **options})
    trainer.fit(make(), datamodule=make_data(8 // processes), ckpt_path=ckpt_path, weights_only=True)


def _rank(rank: int, port: int, processes: int, *arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {k: str(rank) for k in ("RANK", "LOCAL_RANK")} | {"GROUP_RANK": "0"}
    os.environ |= {k: str(processes) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    make, make_data, out, kind, options = arguments
    train(make, make_data, out, processes, kind, options)


def run(make, make_data, out: Path, kind: str | None = None, processes: int = 2, **options: Any) -> dict[str, Any]:
    """Train under a strategy in new processes, as torchrun starts them, or here with none; what :class:`Keep` wrote."""
    if kind is None:
        train(make, make_data, out, 1, None, options)
    else:
        _start(processes, make, make_data, out, kind, options)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def _start(processes: int, *arguments: Any) -> None:
    context = forks.context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=_rank, args=(rank, port, processes, *arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    exits = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert exits == [0] * processes, f"the run failed or hung: {exits}"
