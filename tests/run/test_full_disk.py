"""A disk that fills up in the middle of a run: one message, whole files, and a run that goes on once there is space."""

from __future__ import annotations

import csv
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from tracking_toy import ToyModule

from frpo.__main__ import main
from frpo.cli.track import replay
from frpo.foundation.durable import DiskError
from frpo.run import Checkpoint, CompletionTable, MetricsCSV, MLflowTracker, RunRecord, latest, read_completions

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("small_disk", ["6m"], indirect=True),
]


@pytest.fixture
def tables(sqlite_uri) -> Path:
    """An MLflow database with its tables and no run."""
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    with sqlite3.connect(database) as opened:
        for table in ("tags", "runs"):
            opened.execute(f"delete from {table}")
    return database


class Fill(Callback):
    """Leaves no byte on a disk, in one hook at one step."""

    def __init__(self, disk: Path, hook: str, step: int) -> None:
        self.disk, self.step = disk, step
        setattr(self, hook, self.fill)

    def fill(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step != self.step:
            return
        with (self.disk / "ballast").open("wb", buffering=0) as file:
            for size in (65536, 512, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue


def fit(folder: Path, database: Path, fill: Fill | None = None) -> None:
    plug = [] if fill is None else [fill]
    Trainer(
        max_epochs=2,
        callbacks=[RunRecord(str(folder)), CompletionTable(str(folder), 3), *plug, Checkpoint(str(folder), 2)],
        logger=[
            MLflowTracker(str(folder), f"sqlite:///{database}", timeout_s=2, retry_every_s=0.0),
            MetricsCSV(str(folder)),
        ],
        log_every_n_steps=1,
        val_check_interval=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(ToyModule(batches=4), ckpt_path=latest(folder))


def left(folder: Path, database: Path) -> tuple[list, list, list, list]:
    with (folder / "metrics.csv").open() as file:
        metrics = [(row["step"], row["train/reward"], row["val/reward"]) for row in csv.DictReader(file)]
    with sqlite3.connect(database) as opened:
        steps = opened.execute("select step, value from metrics where key = 'train/reward' order by step").fetchall()
        states = opened.execute("select status from runs").fetchall()
    return list(read_completions(folder)), metrics, steps, states


@pytest.fixture
def expected(tables, tmp_path) -> tuple[list, list, list, list]:
    folder = tmp_path / "whole"
    database = tmp_path / "whole.db"
    shutil.copy(tables, database)
    fit(folder, database)
    return left(folder, database)


@pytest.mark.parametrize(
    ("hook", "step", "named"),
    [
        ("on_train_batch_start", 3, r"part-00000-00001\.jsonl"),  # the step that opens a new part
        ("on_save_checkpoint", 4, r"step=000004\.ckpt"),
        ("on_train_batch_end", 4, r"mlflow_spool\.jsonl"),  # no space in the database, nor for the spool
    ],
)
def test_the_message_names_the_file_and_the_run_goes_on_once_there_is_space(
    small_disk, tables, expected, hook, step, named
):
    folder, database = small_disk / "out", small_disk / "mlflow.db"
    shutil.copy(tables, database)
    with pytest.raises(DiskError, match=rf"cannot write .*{named}: No space left on device .0 bytes free"):
        fit(folder, database, Fill(small_disk, hook, step))
    (small_disk / "ballast").unlink()
    assert latest(folder) is not None
    fit(folder, database)
    assert left(folder, database) == expected


def test_where_the_tracking_database_alone_is_full_the_run_goes_on_and_its_events_wait(
    small_disk, tables, expected, tmp_path
):
    folder, database = tmp_path / "out", small_disk / "mlflow.db"
    shutil.copy(tables, database)
    fit(folder, database, Fill(small_disk, "on_train_batch_start", 3))
    assert left(folder, database)[:2] == expected[:2]
    assert (folder / "mlflow_spool.jsonl").stat().st_size > 0
    (small_disk / "ballast").unlink()
    assert replay(folder / "mlflow_spool.jsonl", f"sqlite:///{database}").waiting == 0
    assert left(folder, database) == expected


def test_a_full_disk_is_one_message_of_the_command(small_disk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["frpo"])
    (tmp_path / "run.yaml").write_text(
        f"""
output_dir: {small_disk}/out
trainer:
  accelerator: cpu
  max_steps: 6
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: frpo.run.checkpoint.Checkpoint
      init_args: {{output_dir: "${{output_dir}}", every_n_train_steps: 2}}
    - class_path: test_full_disk.Fill
      init_args: {{disk: {small_disk}, hook: on_save_checkpoint, step: 4}}
model: {{class_path: cli_fakes.Line}}
data: {{class_path: cli_fakes.Points}}
"""
    )
    assert main(["fit", "--config", "run.yaml"]) == 2
    told = capsys.readouterr().err
    message = told[told.index("frpo fit: error:") :]
    assert "Traceback" not in told
    assert len(message.splitlines()) == 2
    assert "step=000004.ckpt: No space left on device" in message
    assert "earlier checkpoints are whole (last.ckpt, step=000002.ckpt)" in message
    (small_disk / "ballast").unlink()
    resume = ["fit", "--config", "run.yaml", "--ckpt_path", "last", "--trainer.callbacks", "[]"]
    assert main(resume) == 0
