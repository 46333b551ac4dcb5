"""A callback that signals its own process inside a phase of a run; a configuration names it by class_path.

``FRPO_TEST_KILL`` says when, as JSON ``{"phase": ..., "step": ..., "signal": "SIGKILL"}``; without it the callback does
nothing, so that a run to be killed and one to be left alone have the same configuration.
"""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import Callback, LightningModule, Trainer

from frpo.rewards.router import Router
from frpo.rollouts.in_process import InProcessSampler
from frpo.run import checkpoint, checkpoint_io
from frpo.run.checkpoint import Checkpoint
from frpo.run.completions import Parts
from frpo.run.courier import Courier, UnreachableError
from frpo.run.metrics_csv import MetricsCSV
from frpo.run.spool import Spool

sent: list[signal.Signals] = []


def die() -> None:
    """Signal this process, once: it may live on."""
    plan = json.loads(os.environ["FRPO_TEST_KILL"])
    if not sent:
        sent.append(signal.Signals[plan.get("signal", "SIGKILL")])
        os.kill(os.getpid(), sent[0])


class Plug(Callback):
    """Signals at the optimiser step of ``FRPO_TEST_KILL``, in its phase."""

    def __init__(self) -> None:
        plan = json.loads(os.environ.get("FRPO_TEST_KILL", "{}"))
        self.phase, self.step, self.rank = plan.get("phase"), plan.get("step"), plan.get("rank", 0)
        self.sampling = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_rank != self.rank:
            self.phase = None
        if self.phase is not None and stage == "fit":
            self.now = lambda: trainer.global_step == self.step
            self.training = lambda: trainer.training and self.now()
            PLUGS[self.phase](self, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.phase == "rollout":
            pl_module.policy_model.register_forward_pre_hook(self.third_token)
        if self.phase == "backward":
            parameters = [p for p in pl_module.policy_model.parameters() if p.requires_grad]
            parameters[len(parameters) // 2].register_hook(lambda _: die() if self.now() else None)
        if self.phase == "optimiser step":
            trainer.optimizers[0].register_step_post_hook(lambda *_: die() if self.now() else None)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.phase == "validation" and self.now():
            die()

    def third_token(self, *_: Any) -> None:
        if self.sampling and self.training():
            self.tokens = getattr(self, "tokens", 0) + 1
            if self.tokens == 3:
                die()


def rollout(plug: Plug, *_: Any) -> None:
    sample = InProcessSampler.sample

    def flagged(*args: Any, **kwargs: Any) -> Any:
        plug.sampling = True
        try:
            return sample(*args, **kwargs)
        finally:
            plug.sampling = False

    InProcessSampler.sample = flagged  # type: ignore[method-assign]


def reward(plug: Plug, *_: Any) -> None:
    score = Router.__call__
    Router.__call__ = lambda *args: (score(*args), plug.training() and die())[0]  # type: ignore[method-assign]


def slow_reward(plug: Plug, *_: Any) -> None:
    """A batch that takes ten minutes, and a file that says that it is under way."""
    score = Router.__call__

    def slow(*args: Any) -> Any:
        if plug.training():
            Path("waiting").touch()
            time.sleep(600)
        return score(*args)

    Router.__call__ = slow  # type: ignore[method-assign]


def checkpoint_bytes(plug: Plug, *_: Any) -> None:
    write = checkpoint_io._write

    def torn(checkpoint: dict[str, Any], file: BinaryIO) -> None:
        if plug.now():
            whole = io.BytesIO()
            write(checkpoint, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        write(checkpoint, file)

    checkpoint_io._write = torn


def before_rename(plug: Plug, *_: Any) -> None:
    replace = os.replace
    # The callback and the writer both call os.replace of the one module.
    os.replace = lambda a, b: die() if str(b).endswith(".ckpt") and plug.now() else replace(a, b)  # type: ignore[assignment]


def before_last(plug: Plug, *_: Any) -> None:
    link = checkpoint._link
    checkpoint._link = lambda a, b: die() if plug.now() else link(a, b)  # type: ignore[assignment, return-value]


def after_checkpoint(plug: Plug, *_: Any) -> None:
    save = Checkpoint._save
    Checkpoint._save = lambda self, trainer: (save(self, trainer), plug.now() and die())[0]  # type: ignore[method-assign]


def completion_row(plug: Plug, *_: Any) -> None:
    append = Parts.append

    def torn(self: Parts, rows: list[dict[str, Any]]) -> None:
        if rows[0]["stage"] == "train" and rows[0]["step"] == plug.step:
            append(self, rows[:1])
            assert self._file is not None
            self._file.write(json.dumps(rows[1])[:40].encode())
            die()
        append(self, rows)

    Parts.append = torn  # type: ignore[method-assign]


def csv_row(plug: Plug, *_: Any) -> None:
    log = MetricsCSV.log_metrics

    def torn(self: MetricsCSV, metrics: dict[str, float], step: int | None = None) -> None:
        log(self, metrics, step)
        if step == plug.step and any(name.startswith("train/") for name in metrics):
            with self._path.open("rb+") as file:
                file.truncate(self._path.stat().st_size - 30)
            die()

    MetricsCSV.log_metrics = torn  # type: ignore[method-assign]


def in_mlflow(hook: str) -> Callable[..., None]:
    def arm(plug: Plug, *_: Any) -> None:
        """Between the statements of one transaction, or between its commit and the answer."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
        from sqlalchemy import event
        from sqlalchemy.orm import Session

        log = SqlAlchemyStore._log_metrics_once

        def listened(self: Any, run_id: str, metrics: list[Any]) -> Any:
            if metrics and metrics[0].step == plug.step and metrics[0].key.startswith("train/"):
                event.listen(Session, hook, lambda *_: die())
            return log(self, run_id, metrics)

        SqlAlchemyStore._log_metrics_once = listened

    return arm


def spool_line(plug: Plug, *_: Any) -> None:
    """The server is away from the first step on; the process dies in the middle of a line of the spool."""
    deliver = Courier.deliver

    def away(self: Courier, event: dict[str, Any]) -> None:
        if event["op"] == "metrics":
            raise UnreachableError("planted")
        deliver(self, event)

    append = Spool.append

    def torn(self: Spool, event: dict[str, Any]) -> None:
        if event.get("step") == plug.step and any(name.startswith("train/") for name in event.get("metrics", {})):
            with self.path.open("a") as file:
                file.write(json.dumps(event)[:60])
            die()
        append(self, event)

    Courier.deliver, Spool.append = away, torn  # type: ignore[method-assign]


def nothing(*_: Any) -> None:
    pass


PHASES: dict[str, Callable[..., None]] = {
    "rollout": rollout,
    "reward": reward,
    "backward": nothing,  # hooks of the model and the optimiser, which are there at the start of training
    "optimiser step": nothing,
    "validation": nothing,
    "completion row": completion_row,
    "metrics.csv row": csv_row,
    "checkpoint bytes": checkpoint_bytes,
    "checkpoint before rename": before_rename,
    "checkpoint before last.ckpt": before_last,
    "right after a checkpoint": after_checkpoint,
    "MLflow transaction": in_mlflow("after_flush"),
    "MLflow answer": in_mlflow("after_commit"),
    "spool line": spool_line,
}
PLUGS = {**PHASES, "slow reward": slow_reward}
