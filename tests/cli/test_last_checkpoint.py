"""``--ckpt_path last`` when the newest checkpoint is damaged."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from frpo.cli.checkpoint import find_checkpoint
from frpo.run.checkpoint_files import is_whole, latest

RUN = ("fit", "--config", "base.yaml")


def cut_short(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def emptied(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(0)


def a_bit_flipped(path: Path) -> None:
    """In the data of the last tensor: the archive's directory and every header stay as they were."""
    with zipfile.ZipFile(path) as archive:
        record = [item for item in archive.infolist() if "/data/" in item.filename][-1]
        offset = archive.open(record)._orig_compress_start  # type: ignore[attr-defined]
    with path.open("rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def checkpoints(folder, frpo) -> Path:
    """Steps 2 and 4, and ``last.ckpt``, a second name of the newer."""
    assert frpo(*RUN)[0] == 0
    return folder / "outputs/small/checkpoints"


@pytest.mark.parametrize("damage", [cut_short, emptied, a_bit_flipped])
def test_the_one_before_is_taken_and_both_are_named(checkpoints, folder, frpo, damage):
    last = checkpoints / "last.ckpt"
    assert last.samefile(checkpoints / "step=000004.ckpt")
    damage(last)  # in place: both names
    status, _, err = frpo(*RUN, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert status == 0, err
    (warning,) = [line for line in err.splitlines() if "is damaged" in line]
    damaged, used = warning.split("; using the one before it, ")
    assert str(last) in damaged
    assert "step=000004.ckpt (step 4)" in damaged
    assert used == f"{checkpoints}/step=000002.ckpt (step 2)"
    assert json.loads((folder / "outputs/small/seen.json").read_text())["steps"] == 6
    assert is_whole(last)
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_what_torch_reads_without_a_complaint_is_refused_by_its_path_too(checkpoints, refused):
    path = checkpoints / "step=000004.ckpt"
    a_bit_flipped(path)
    torch.load(path, weights_only=True, mmap=True)
    assert "is damaged" in refused("--ckpt_path", str(path), "--trainer.max_steps", "6")


def test_last_alone_damaged_leaves_its_step(checkpoints, capsys):
    last = checkpoints / "last.ckpt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[:100])
    assert find_checkpoint("last", [checkpoints]).name == "step=000004.ckpt"
    assert f"{last} (step unknown) is damaged" in capsys.readouterr().err


def test_without_a_whole_one_the_damaged_are_named(checkpoints, refused):
    for file in checkpoints.glob("*.ckpt"):
        emptied(file)
    assert latest(checkpoints) is None
    message = refused("--ckpt_path", "last")
    assert "no whole checkpoint" in message
    assert "step=000002.ckpt" in message


def test_a_whole_newest_is_taken_without_a_word(checkpoints, capsys):
    assert find_checkpoint("last", [checkpoints]).name == "last.ckpt"
    assert capsys.readouterr().err == ""
