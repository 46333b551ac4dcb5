"""How a run is doing, on a terminal or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

_SECONDS = "train/seconds_"
_SHOWN = ("reward", "kl", "loss", "accuracy", "ess")


class Progress(TQDMProgressBar):
    """A bar on a terminal, plain lines elsewhere: reward, KL, loss, accuracy, effective sample size, phase seconds.

    Where standard output is not a terminal one line is printed for the first rollout and then every
    ``trainer.log_every_n_steps`` of them, and one for every validation and test::

        step 40/500 | reward 0.512 | kl 0.0031 | loss -0.012 | ess 5.2 | rollout 1.2s | update 0.8s | 2.31 s/rollout

    The step counts optimiser steps, as ``max_steps`` does. Where no completions are drawn, read step for rollout.

    Args:
        refresh_rate: Rollouts between two refreshes of the bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._plain = False
        self._rollouts = 0
        self._since = 0.0
        self._rollouts_since = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()
            self._plain = trainer.is_global_zero

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows beside its count."""
        return {name: _number(value) for name, value in shown(trainer.callback_metrics).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training starts before its first, slow step is done."""
        super().on_train_start(trainer, pl_module)
        self._rollouts = self._rollouts_since = 0
        self._since = time.monotonic()
        self._line(f"training from step {trainer.global_step}{_of(trainer)}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the rollout."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._rollouts += 1
        self._rollouts_since += 1
        every = max(1, getattr(trainer, "log_every_n_steps", 1))
        if self._plain and (self._rollouts == 1 or self._rollouts % every == 0):
            now = time.monotonic()
            pace = (now - self._since) / self._rollouts_since
            self._since, self._rollouts_since = now, 0
            head = f"step {trainer.global_step}{_of(trainer)}"
            self._line(" | ".join([head, *_fields(trainer), f"{pace:.2f} s/{_unit(pl_module)}"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a validation."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._evaluation(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a test."""
        super().on_test_end(trainer, pl_module)
        self._evaluation(trainer, "test")

    def _evaluation(self, trainer: Trainer, stage: str) -> None:
        metrics = trainer.callback_metrics
        fields = [
            f"{name.removeprefix(stage + '/')} {_number(value)}"
            for name, value in metrics.items()
            if name.startswith(f"{stage}/")
        ]
        # Outside of fit the step is 0, whatever checkpoint is evaluated.
        when = f" at step {trainer.global_step}" if trainer.state.fn == TrainerFn.FITTING else ""
        self._line(" | ".join([f"{stage}{when}", *fields]))

    def _line(self, text: str) -> None:
        if self._plain:
            print(text, flush=True)


def shown(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics worth a glance, under short names: reward, kl, loss, ess, then seconds by phase."""
    chosen = {name: f"train/{name}" for name in _SHOWN if f"train/{name}" in metrics}
    chosen |= {f"{key.removeprefix(_SECONDS)}_s": key for key in metrics if key.startswith(_SECONDS)}
    return {name: float(metrics[key]) for name, key in chosen.items()}


def _fields(trainer: Trainer) -> list[str]:
    values = shown(trainer.callback_metrics)
    return [
        f"{name.removesuffix('_s')} {value:.1f}s" if name.endswith("_s") else f"{name} {_number(value)}"
        for name, value in values.items()
    ]


def _unit(pl_module: LightningModule) -> str:
    """What one training batch is: a rollout where the module draws completions."""
    return "rollout" if hasattr(pl_module, "sampler") else "step"


def _number(value: float | Tensor) -> str:
    return f"{float(value):.3g}"


def _of(trainer: Trainer) -> str:
    return f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
