from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from tracking_toy import GROUP, Fixed, StepRecord, ToyModule, scored_batch

from frpo.run.checkpoint import Checkpoint, latest
from frpo.run.checkpoint_io import AtomicCheckpointIO
from frpo.run.completion_table import CompletionTable
from frpo.run.completions import Parts, read_completions


def trainer(folder: Path, *callbacks: Callback, every: int = 1, **settings) -> Trainer:
    return Trainer(
        max_epochs=2,
        callbacks=[*callbacks, CompletionTable(str(folder), 3), Checkpoint(str(folder), every, save_top_k=-1)],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=2,
        **settings,
    )


def keys(folder: Path) -> list[tuple[str, int, int, int]]:
    return [(r["stage"], r["step"], r["position"], r["sample"]) for r in read_completions(folder)]


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "completions").glob("part-*"))


def test_every_completion_of_training_validation_and_test_is_a_row(tmp_path):
    run = trainer(tmp_path)
    module = ToyModule(batches=4)
    run.fit(module)
    run.test(module, verbose=False)
    rows = list(read_completions(tmp_path))
    count = Counter((row["stage"], row["step"]) for row in rows)
    # 2 prompts a rollout, 2 validation prompts every 2 steps, 3 test prompts; the sanity check is no validation.
    expected = {("train", step): 2 * GROUP for step in range(8)}
    expected |= {("val", step): 2 * GROUP for step in (2, 4, 6, 8)} | {("test", 8): 3 * GROUP}
    assert count == expected
    assert len(set(keys(tmp_path))) == len(rows)
    first = rows[0]
    assert first == {
        "stage": "train", "step": 0, "position": 0, "prompt_id": "p0", "task": "even", "sample": 0,
        "prompt": "prompt 0", "completion": "answer 0.0 é", "tokens": 3, "truncated": False, "status": "value",
        "reward": 0.0, "components": {"length": 1.0}, "reason": "", "weight": 0.5,
    }  # fmt: skip
    assert [row["stage"] for row in rows][:12] == ["train"] * 8 + ["val"] * 4
    assert parts(tmp_path)[0] == "part-00000-00000.jsonl"
    assert len(parts(tmp_path)) == 4


def test_a_second_test_at_the_same_step_replaces_the_first_also_in_a_new_process(tmp_path):
    module = ToyModule(batches=4)
    run = trainer(tmp_path)
    run.fit(module)
    run.test(module, verbose=False)
    before = keys(tmp_path)
    run.test(module, verbose=False)
    assert sorted(keys(tmp_path)) == sorted(before)
    # A new trainer does not know its step: the checkpoint does.
    trainer(tmp_path).test(ToyModule(batches=4), ckpt_path=latest(tmp_path), verbose=False)
    assert sorted(keys(tmp_path)) == sorted(before)


def test_a_fresh_run_in_the_same_folder_moves_the_earlier_table_aside(tmp_path):
    trainer(tmp_path).fit(ToyModule(batches=2))
    earlier = keys(tmp_path)
    trainer(tmp_path, limit_val_batches=0).fit(ToyModule(batches=2))
    assert {key[0] for key in keys(tmp_path)} == {"train"}
    assert keys(tmp_path / "completions.1") == earlier


def test_a_failed_run_keeps_its_rows(tmp_path):
    with pytest.raises(RuntimeError, match="planted"):
        trainer(tmp_path).fit(ToyModule(batches=4, fail_at=3))
    assert {key[1] for key in keys(tmp_path) if key[0] == "train"} == {0, 1, 2}


@pytest.mark.parametrize("updates", [1, 3])
def test_a_resume_from_any_checkpoint_leaves_the_rows_of_an_uninterrupted_run(tmp_path, updates):
    trainer(tmp_path).fit(ToyModule(batches=4, updates=updates))
    whole = keys(tmp_path)
    checkpoints = sorted((tmp_path / "checkpoints").glob("step=*.ckpt"))
    assert len(checkpoints) == 8
    for checkpoint in checkpoints:
        part = sorted((tmp_path / "completions").glob("part-*"))[-1]
        with part.open("a") as file:
            file.write('{"stage": "train", "st')
        trainer(tmp_path).fit(ToyModule(batches=4, updates=updates), ckpt_path=checkpoint)
        assert keys(tmp_path) == whole, checkpoint
        for file in (tmp_path / "completions").glob("part-*"):
            assert all(line.endswith("}\n") for line in file.read_text().splitlines(keepends=True)), file


@pytest.mark.slow
def test_killed_anywhere_and_resumed_the_table_is_that_of_an_uninterrupted_run(tmp_path):
    """SIGKILL before and after rows are written, in a validation, while a checkpoint is saved, in mid-line."""
    script = Path(__file__).parents[1] / "helpers" / "tracking_kill.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["killed"]) == 8
    assert set(result["killed"].values()) == {"same"}, result


def test_ranks_write_their_own_parts_and_are_read_in_one_order(tmp_path):
    for rank, order in ((0, [0, 2]), (1, [1, 3])):
        own = Parts(tmp_path / "completions", rank)
        for step in (0, 1):
            own.append([{"stage": "train", "step": step, "position": 4 * step + p, "sample": 0} for p in order])
    assert parts(tmp_path) == ["part-00000-00000.jsonl", "part-00001-00000.jsonl"]
    assert [row["position"] for row in read_completions(tmp_path)] == list(range(8))


def test_a_reader_leaves_out_a_line_that_is_being_written(tmp_path):
    own = Parts(tmp_path, 0)
    own.append([{"stage": "train", "step": 0, "position": 0, "sample": 0}])
    with (tmp_path / "part-00000-00000.jsonl").open("a") as file:
        file.write('{"stage"')
    assert len(list(read_completions(tmp_path))) == 1


def test_no_table_is_an_error_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected part-\*.jsonl"):
        read_completions(tmp_path)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    own = Parts(tmp_path, 0)
    own.append([{"n": 0}])

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    own._file = Full()
    with pytest.raises(OSError, match=r"cannot write .*part-00000-00000.jsonl: No space left on device .*bytes free"):
        own.append([{"n": 1}])


def test_a_reason_that_quotes_an_address_loses_its_secret(tmp_path):
    table = CompletionTable(str(tmp_path))
    scored = scored_batch([0])
    judgement = type(scored.judgements[0]).failed("401 from https://u:planted@judge/v1?token=planted")
    object.__setattr__(scored, "judgements", (judgement, judgement))
    module = SimpleNamespace(last_step=StepRecord("train", 0, scored))
    table._write(SimpleNamespace(global_rank=0, state=SimpleNamespace(fn="fit")), module)
    assert "planted" not in (tmp_path / "completions" / "part-00000-00000.jsonl").read_text()
    assert next(iter(read_completions(tmp_path)))["reward"] is None


def test_parts_of_no_rollouts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="upload_every_n_steps: got 0"):
        CompletionTable(str(tmp_path), 0)


def test_rows_are_on_the_disk_before_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    events: list[str] = []
    sync, save = Parts.sync, AtomicCheckpointIO.save_checkpoint

    def watched_sync(self):
        events.append("rows")
        sync(self)

    def watched_save(self, *arguments, **options):
        events.append("checkpoint")
        save(self, *arguments, **options)

    monkeypatch.setattr(Parts, "sync", watched_sync)
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", watched_save)
    trainer(tmp_path, limit_val_batches=0, max_steps=2).fit(ToyModule(batches=4))
    assert events[:4] == ["rows", "checkpoint", "rows", "checkpoint"]


def test_a_module_that_draws_no_completions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a BoringModel, expected a module that draws completions"):
        trainer(tmp_path).fit(BoringModel())


def test_the_toy_validates_the_same_prompts_every_time():
    assert [batch.tolist() for batch in Fixed()] == [[0], [1]]
