"""Runs in one process, or in two under FSDP2, shared by the tests of sharded training."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import runs
import supervised_runs
import tampering
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from frpo.callbacks.checkpoint import Checkpoint
from frpo.callbacks.evaluation import Evaluation
from frpo.data.module import RowsDataModule
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled
from frpo.models.sharding import gathered
from frpo.modules.policy_module import PolicyModule
from frpo.objectives import FRPO
from frpo.penalty import KLPenalty
from frpo.schedules import AdaptiveKL, KLBudget


class Keep(runs.L.Callback):
    """Metrics of every step, of the last validation, and the last weights whole, written by the process of rank 0."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, float]] = []
        self.held_out: dict[str, float] = {}

    def on_train_start(self, trainer, module) -> None:
        if trainer.world_size > 1:
            cut = [p for p in module.parameters() if isinstance(p, DTensor)]
            assert sum(p.to_local().numel() for p in cut) < 0.6 * sum(p.numel() for p in module.parameters())

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
        "kl": KLPenalty(beta=AdaptiveKL(initial=0.1, target=0.01)),
        "lam_schedule": KLBudget(rho=0.3, window=16),
    }
    return runs.full(model_dir, **{**arguments, **changes})


def lora(model_dir: Path, **changes: Any) -> PolicyModule:
    """The same with an adapter, whose reference is the adapter switched off."""
    policy = Policy(str(model_dir), adapter=LoRA(r=4, alpha=8), dtype="float64", gradient_checkpointing=True)
    return full(model_dir, **{"policy": policy, "reference": AdapterDisabled(), **changes})


def prompts(batch_size: int) -> RowsDataModule:
    return runs.data(n=24, batch_size=batch_size, val=6)


def supervised(model_dir: Path) -> PolicyModule:
    return supervised_runs.module(model_dir, max_grad_norm=0.05)


def demonstrations(batch_size: int) -> RowsDataModule:
    return supervised_runs.data(batch_size=batch_size, val=6)


def tamper(model_dir: Path) -> PolicyModule:
    return tampering.module(model_dir)


def attacks(batch_size: int) -> RowsDataModule:
    return tampering.data(batch_size=batch_size // 2, attacks_per_step=1, val=tampering.Pairs(4))


def train(make, make_data, out: Path, processes: int, options: dict[str, Any]) -> None:
    """One rank's run; ``options`` go to the Trainer, ``ckpt_path`` to fit, ``suites`` to Evaluation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ckpt_path, suites = options.pop("ckpt_path", None), options.pop("suites", None)
    folder = out.with_suffix("")
    callbacks = [Keep(out), Checkpoint(str(folder), every_n_train_steps=2, save_top_k=-1)]
    if suites is not None:
        callbacks.append(Evaluation(str(folder), suites(8 // processes), every_n_train_steps=2))
    strategy: Any = "auto"
    if processes > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    trainer = runs.trainer(
        out.parent,
        **{
            "devices": processes,
            "strategy": strategy,
            "max_steps": 3,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": True,
            "callbacks": callbacks,
            **options,
        },
    )
    trainer.fit(make(), datamodule=make_data(8 // processes), ckpt_path=ckpt_path)


def _rank(rank: int, port: int, make, make_data, out: Path, processes: int, options: dict[str, Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {k: str(rank) for k in ("RANK", "LOCAL_RANK")} | {"GROUP_RANK": "0"}
    os.environ |= {k: str(processes) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    train(make, make_data, out, processes, options)


def run(make, make_data, out: Path, processes: int, **options: Any) -> dict[str, Any]:
    """Train in new processes, as torchrun starts them; what :class:`Keep` wrote."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded_runs"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = (make, make_data, out, processes, options)
    started = [
        context.Process(target=train, args=common)
        if processes == 1
        else context.Process(target=_rank, args=(rank, port, *common))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    exits = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert exits == [0] * processes, f"the run failed or hung: {exits}"
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result
