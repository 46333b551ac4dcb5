"""A run that is killed and resumed ends with the weights of one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import forks
import pytest
import runs
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from frpo.models.policy import LoRA, Policy
from frpo.objectives import FRPO
from frpo.penalty import KLPenalty
from frpo.schedules import AdaptiveKL, Cosine, KLBudget

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8


class Kill(runs.L.Callback):
    """SIGKILL to the process at optimiser step ``step``, in ``hook``."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.strike)  # a hook of the name given

    def strike(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillingReward(runs.Graded):
    """A reward that kills the process in its ``call``-th call, and draws noise from the global generator."""

    def __init__(self, call: int = 0) -> None:
        super().__init__(fail_every=7)
        self.call, self.calls = call, 0

    def __call__(self, completions):
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.rand(len(completions)).tolist()
        return [
            runs.Judgement.of(j.value + u) if j.status == "value" else j
            for j, u in zip(super().__call__(completions), noise, strict=True)
        ]


def run(model_dir: Path, root: Path, *, full: bool, kill=None, call: int = 0, ckpt: str | None = None) -> None:
    """Eight optimiser steps over two epochs of prompts, validation in between; weights go to ``root/final.pt``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = runs.module(
        model_dir,
        policy=Policy(str(model_dir), adapter=None if full else LoRA(r=4, alpha=8)),
        reference=runs.FrozenCopy(),
        objective=FRPO(lam=1.0),
        reward=KillingReward(call),
        max_failure_rate=1.0,
        kl=KLPenalty(beta=AdaptiveKL(initial=0.1, target=0.01)),
        lam_schedule=KLBudget(rho=0.5, window=8),
        lr_schedule=Cosine(1.0, 0.0, STEPS, warmup=2),
    )
    trainer = runs.trainer(
        root,
        log_every_n_steps=4,
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=True,
        val_check_interval=1,
        callbacks=[
            *([Kill(*kill)] if kill else []),
            ModelCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=2, save_last=True, save_top_k=-1),
        ],
    )
    trainer.fit(model, datamodule=runs.data(n=16, val=4), ckpt_path=ckpt, weights_only=True)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/") and "seconds" not in k}
    extra = {
        "logged": logged,
        "beta": model.kl.beta.value(0),
        "lambda": model.lam_schedule.value(0),
        "texts": model.last_step.scored.records()[0]["completion"],
    }
    torch.save({**runs.weights(model), "extra": extra}, root / "final.pt")


@pytest.fixture(scope="module")
def whole(model_dir: Path, tmp_path_factory) -> dict[bool, Path]:
    """The folders of two runs that nothing interrupts, with an adapter and with full weights."""
    roots = {full: tmp_path_factory.mktemp("uninterrupted") for full in (False, True)}
    for full, root in roots.items():
        assert forks.call(run, model_dir, root, full=full) == 0
    return roots


@pytest.mark.parametrize(
    "death",
    [
        {"kill": ("on_train_batch_start", 3)},
        {"call": 13},
        {"kill": ("on_before_optimizer_step", 4)},
        {"kill": ("on_train_batch_end", 5)},
        {"kill": ("on_validation_end", 6)},
    ],
    ids=str,
)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_killed_and_resumed_is_bit_identical(whole, model_dir: Path, tmp_path: Path, full: bool, death) -> None:
    expected = torch.load(whole[full] / "final.pt", weights_only=True)
    assert forks.call(run, model_dir, tmp_path, full=full, **death) == -signal.SIGKILL
    last = tmp_path / "checkpoints" / "last.ckpt"
    resumed_from = torch.load(last, weights_only=True)["global_step"]
    assert 0 < resumed_from < STEPS
    assert forks.call(run, model_dir, tmp_path, full=full, ckpt=str(last)) == 0
    final = torch.load(tmp_path / "final.pt", weights_only=True)
    assert final.pop("extra") == expected["extra"]
    assert all(torch.equal(value, expected[name]) for name, value in final.items())


def test_a_checkpoint_holds_what_trains_and_no_more(whole) -> None:
    checkpoint = torch.load(whole[False] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["frpo"]["schedules"].keys() == {"beta", "lambda", "lr"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("frpo"), "was not written by policy optimisation"),
        (lambda c: c["state_dict"].popitem(), "does not fit this configuration: 1 of"),
        (lambda c: c["state_dict"].update({k: v[:1] for k, v in list(c["state_dict"].items())[:1]}), "got \\(1,"),
        (
            lambda c: c["frpo"]["policy"]["init_args"]["adapter"].update(alpha=99),
            "trained with the adapter .*'alpha': 99",
        ),
        (lambda c: c["frpo"]["schedules"].pop("lambda"), "the checkpoint has schedules"),
        (lambda c: c["frpo"]["schedules"].update(beta={}), "AdaptiveKL: the checkpoint's schedule state"),
    ],
)
def test_refuses_a_checkpoint_of_another_run(whole, model_dir: Path, tmp_path: Path, change, named: str) -> None:
    checkpoint = torch.load(whole[False] / "checkpoints" / "last.ckpt", weights_only=True)
    change(checkpoint)
    path = tmp_path / "changed.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=named):
        run(model_dir, tmp_path, full=False, ckpt=str(path))
