from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tracking_toy import ToyModule

from frpo.run.checkpoint import Checkpoint, latest
from frpo.run.checkpoint_io import AtomicCheckpointIO


def trainer(folder: Path, *callbacks: Callback, epochs: int = 1, **settings) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **settings,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


class Saves(Callback):
    """What happens, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.events.append(f"save {trainer.global_step}")

    def on_validation_end(self, trainer, pl_module):
        self.events.append(f"val {trainer.global_step}")


class LogsStep(ToyModule):
    """Logs ``step`` as the axis of its metrics: the step before the update."""

    def training_step(self, batch, batch_idx):
        self.log("step", float(self.global_step))
        return super().training_step(batch, batch_idx)


def test_a_file_is_named_after_the_steps_taken_whatever_step_is_logged(tmp_path):
    trainer(tmp_path, Checkpoint(str(tmp_path), 2), limit_val_batches=0).fit(LogsStep(batches=5))
    assert names(tmp_path) == ["last.ckpt", "step=000004.ckpt", "step=000005.ckpt"]


def test_keeps_the_two_newest_and_last_as_a_second_name_of_the_newer(tmp_path):
    trainer(tmp_path, Checkpoint(str(tmp_path), 2), limit_val_batches=0).fit(ToyModule(batches=5))
    assert names(tmp_path) == ["last.ckpt", "step=000004.ckpt", "step=000005.ckpt"]
    folder = tmp_path / "checkpoints"
    assert step_of(folder / "last.ckpt") == 5
    assert os.path.samefile(folder / "last.ckpt", folder / "step=000005.ckpt")
    assert latest(tmp_path) == latest(folder) == folder / "last.ckpt"


def test_keeps_all_or_the_best_or_last_alone(tmp_path):
    for folder, settings in (
        ("all", {"save_top_k": -1}),
        ("best", {"save_top_k": 1, "monitor": "train/reward", "mode": "min"}),
        ("newest", {"save_top_k": 1}),
        ("last", {"save_top_k": 0}),
    ):
        trainer(tmp_path, Checkpoint(str(tmp_path / folder), 2, **settings), limit_val_batches=0).fit(ToyModule(5))
    assert names(tmp_path / "all") == ["last.ckpt", "step=000002.ckpt", "step=000004.ckpt", "step=000005.ckpt"]
    assert names(tmp_path / "best") == ["last.ckpt", "step=000002.ckpt"]
    assert step_of(tmp_path / "best" / "checkpoints" / "last.ckpt") == 5
    assert names(tmp_path / "newest") == ["last.ckpt", "step=000005.ckpt"]
    assert names(tmp_path / "last") == ["last.ckpt"]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({"save_top_k": -1}, {"save_top_k": 2}, ["step=000006.ckpt", "step=000007.ckpt"]),
        ({"save_top_k": 2}, {"save_top_k": 1}, ["step=000007.ckpt"]),
        ({"save_top_k": 2}, {"save_top_k": 0}, []),
        # A metric is not ranked against steps: the best of the resumed run is kept beside the files of before.
        (
            {},
            {"monitor": "train/reward", "save_top_k": 1},
            ["step=000002.ckpt", "step=000004.ckpt", "step=000007.ckpt"],
        ),
    ],
)
def test_a_resume_may_keep_fewer_or_by_another_metric(tmp_path, before, after, kept):
    trainer(tmp_path, Checkpoint(str(tmp_path), 2, **before), limit_val_batches=0, max_steps=4).fit(ToyModule(7))
    again = trainer(tmp_path, Checkpoint(str(tmp_path), 2, **after), limit_val_batches=0)
    again.fit(ToyModule(7), ckpt_path=latest(tmp_path))
    assert names(tmp_path) == ["last.ckpt", *kept]


def test_several_updates_a_rollout_do_not_jump_over_a_checkpoint(tmp_path):
    saves = Saves()
    trainer(tmp_path, saves, Checkpoint(str(tmp_path), 4), limit_val_batches=0).fit(ToyModule(5, updates=3))
    # global_step runs 3, 6, 9, 12, 15 and passes 4, 8 and 12.
    assert saves.events == ["save 6", "save 9", "save 12", "save 15"]


def test_a_checkpoint_waits_for_the_validation_of_its_step(tmp_path):
    saves = Saves()
    trainer(tmp_path, saves, Checkpoint(str(tmp_path), 1), val_check_interval=2).fit(ToyModule(batches=4))
    assert saves.events == ["save 1", "val 2", "save 2", "save 3", "val 4", "save 4"]


def test_a_resume_with_more_steps_goes_on_where_the_shorter_run_stopped(tmp_path):
    trainer(tmp_path, Checkpoint(str(tmp_path), 2), limit_val_batches=0, max_steps=3).fit(ToyModule(6))
    saves = Saves()
    again = trainer(tmp_path, saves, Checkpoint(str(tmp_path), 4), limit_val_batches=0)
    module = ToyModule(6)
    again.fit(module, ckpt_path=latest(tmp_path))
    assert module.seen == [6, 7, 8, 9, 10, 11]
    assert saves.events == ["save 4", "save 6"]
    assert names(tmp_path) == ["last.ckpt", "step=000004.ckpt", "step=000006.ckpt"]


def test_latest_passes_over_what_is_cut_short(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    checkpoints = tmp_path / "checkpoints"
    trainer(tmp_path, Checkpoint(str(tmp_path), 2, save_top_k=-1), limit_val_batches=0).fit(ToyModule(4))
    whole = checkpoints / "step=000002.ckpt"
    for name in ("last.ckpt", "step=000004.ckpt"):
        content = (checkpoints / name).read_bytes()
        (checkpoints / name).unlink()
        (checkpoints / name).write_bytes(content[: len(content) // 2])
    assert latest(tmp_path) == whole
    assert latest(checkpoints / "step=000004.ckpt") is None
    assert latest(whole) == whole


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt.partial").write_bytes(b"half")
    trainer(tmp_path, Checkpoint(str(tmp_path), 2), limit_val_batches=0).fit(ToyModule(2))
    assert names(tmp_path) == ["last.ckpt", "step=000002.ckpt"]


def test_a_save_that_hits_a_limit_says_so_and_leaves_the_earlier_checkpoint_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(10)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*last.ckpt: .*bytes free.*last.ckpt") as refused:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_ends_the_run_with_the_earlier_checkpoint_whole(small_disk):
    class Grow(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if trainer.global_step > 2:
                checkpoint["ballast"] = torch.zeros(300_000)

    with pytest.raises(OSError, match=r"No space left on device \([\d,]+ bytes free.*free space there") as refused:
        trainer(small_disk, Grow(), Checkpoint(str(small_disk), 2), limit_val_batches=0).fit(ToyModule(6))
    assert refused.value.errno == errno.ENOSPC
    assert "step=000004.ckpt" in str(refused.value)
    assert "earlier checkpoints are whole (last.ckpt, step=000002.ckpt)" in str(refused.value)
    assert names(small_disk) == ["last.ckpt", "step=000002.ckpt"]
    assert step_of(latest(small_disk)) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    module = ToyModule(2)
    with pytest.raises(OSError, match=r"cannot write .*checkpoints.*choose another output_dir"):
        trainer(tmp_path, Checkpoint(str(tmp_path), 2), limit_val_batches=0).fit(module)
    assert module.last_step is None


def test_a_read_only_disk_is_refused_before_the_first_step(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    module = ToyModule(2)
    with pytest.raises(OSError, match=r"Read-only file system .*make the folder writable"):
        trainer(small_disk, Checkpoint(str(small_disk), 2), limit_val_batches=0).fit(module)
    assert module.last_step is None


def test_no_steps_between_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_train_steps: got 0"):
        Checkpoint(str(tmp_path), 0)
