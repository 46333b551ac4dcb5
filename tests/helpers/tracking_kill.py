"""Kill a training run at eight places, resume each, and compare its rows and metrics with an uninterrupted run.

Run as a script with an empty folder: Lightning is imported once and every run is a fork, so that each kill is real.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tracking_toy import ToyModule

from frpo.run.checkpoint import Checkpoint, latest
from frpo.run.checkpoint_io import AtomicCheckpointIO
from frpo.run.completion_table import CompletionTable
from frpo.run.completions import Parts, read_completions
from frpo.run.metrics_csv import MetricsCSV
from frpo.run.run_record import RunRecord


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """Dies in one hook at one ``global_step``; before the table's own hook, or after it."""

    def __init__(self, hook: str, step: int, place: str) -> None:
        self.hook, self.step, self.place = hook, step, place

    def _at(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            die()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._at("train", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("validation start", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._at("validation end", trainer)


def half_a_line(step: int) -> None:
    write = Parts.append

    def torn(self: Parts, rows: list[dict[str, Any]]) -> None:
        write(self, rows[:1])
        if rows[0]["stage"] == "train" and rows[0]["step"] == step:
            assert self._file is not None
            self._file.write(json.dumps(rows[1])[:20].encode())
            die()
        write(self, rows[1:])

    Parts.append = torn  # type: ignore[method-assign]


def half_a_checkpoint(step: int) -> None:
    save = AtomicCheckpointIO.save_checkpoint

    def torn(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] == step:
            Path(f"{path}.partial").write_bytes(b"PK half")
            die()
        save(self, checkpoint, path, storage_options)

    AtomicCheckpointIO.save_checkpoint = torn  # type: ignore[method-assign]


def fit(folder: Path, kill: Kill | None) -> None:
    table: list[Callback] = [CompletionTable(str(folder), 3)]
    if kill is not None:
        table = [kill, *table] if kill.place == "before" else [*table, kill]
    trainer = Trainer(
        max_epochs=2,
        callbacks=[RunRecord(str(folder)), *table, Checkpoint(str(folder), 2, save_top_k=0)],
        logger=[MetricsCSV(str(folder))],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=2,
    )
    trainer.fit(ToyModule(batches=4), ckpt_path=latest(folder))


def forked(folder: Path, kill: Kill | None = None, setup: Any = None) -> int:
    """Fit in a child process; return the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            if setup is not None:
                setup()
            fit(folder, kill)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, f"the run in {folder} failed"
    return os.WTERMSIG(status)


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(read_completions(folder))


def metrics(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["train/reward"], row["val/reward"]) for row in csv.DictReader(file)]


KILLS: dict[str, tuple[Kill | None, Any]] = {
    "after a row, before its checkpoint": (Kill("train", 4, "after"), None),
    "before the first checkpoint": (Kill("train", 1, "after"), None),
    "before a row": (Kill("train", 5, "before"), None),
    "before a validation that follows a checkpoint": (Kill("validation start", 4, "after"), None),
    "in a validation": (Kill("validation", 6, "after"), None),
    "after a validation, before its checkpoint": (Kill("validation end", 4, "after"), None),
    "in the middle of a line": (None, lambda: half_a_line(3)),
    "in the middle of a checkpoint": (None, lambda: half_a_checkpoint(6)),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    forked(folder / "whole")
    outcome = {}
    for n, (name, (kill, setup)) in enumerate(KILLS.items()):
        run = folder / str(n)
        assert forked(run, kill, setup) == signal.SIGKILL, name
        forked(run)
        same_rows = rows(run) == rows(folder / "whole")
        same_metrics = metrics(run) == metrics(folder / "whole")
        outcome[name] = "same" if same_rows and same_metrics else f"rows {same_rows}, metrics {same_metrics}"
    print(json.dumps({"killed": outcome}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
