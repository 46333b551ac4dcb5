"""One process with a batch of 2P prompts and two processes with P each train the same policy."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import runs
import torch
from lightning.pytorch.strategies import DDPStrategy

from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled
from frpo.objectives import FRPO
from frpo.penalty import KLPenalty
from frpo.schedules import AdaptiveKL, KLBudget

pytestmark = pytest.mark.filterwarnings("ignore")


class Keep(runs.L.Callback):
    """Metrics of every step and the last weights, written by the process of rank 0."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        metrics = trainer.callback_metrics.items()
        self.rows.append({k: float(v) for k, v in metrics if k.startswith("train/") and "seconds" not in k})

    def on_train_end(self, trainer, module) -> None:
        if trainer.is_global_zero:
            torch.save({"weights": runs.weights(module), "rows": self.rows}, self.out)


def run(model_dir: Path, out: Path, processes: int, epochs: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = runs.module(
        model_dir,
        policy=Policy(str(model_dir), adapter=LoRA(r=4, alpha=8), dtype="float64"),
        reference=AdapterDisabled(),
        objective=FRPO(lam=0.5, clip="ppo"),
        reward=runs.Graded(fail_every=3),  # groups lose members, and ranks lose different numbers of groups
        max_failure_rate=1.0,
        group_size=3,
        micro_batch_size=2,
        epochs_per_rollout=epochs,
        kl=KLPenalty(beta=AdaptiveKL(initial=0.1, target=0.01)),
        lam_schedule=KLBudget(rho=0.3, window=16),
    )
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    trainer = runs.trainer(
        out.parent, devices=processes, strategy=strategy, max_steps=4 * epochs, max_epochs=-1, callbacks=[Keep(out)]
    )
    trainer.fit(model, datamodule=runs.data(n=24, batch_size=8 // processes))


@pytest.mark.parametrize("epochs", [1, 2])
def test_two_processes_equal_one(model_dir: Path, tmp_path: Path, epochs: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "frpo.modules.policy_optimization"])
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        process = context.Process(target=run, args=(model_dir, out, processes, epochs))
        process.start()
        process.join(240)
        assert process.exitcode == 0, "the run failed or hung"
        results.append(torch.load(out, weights_only=True))
    one, two = results
    for name, value in one["weights"].items():
        assert (value - two["weights"][name]).abs().max() < 1e-6, name
    assert len(one["rows"]) == 4
    assert {"train/reward", "train/reward/odd", "train/kl", "train/lambda"} <= one["rows"][-1].keys()
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
