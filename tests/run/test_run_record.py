from __future__ import annotations

import json
import subprocess

import lightning
import torch
import yaml
from lightning.pytorch import Trainer
from tracking_toy import ToyModule

from frpo.run.run_record import RunRecord, git_revision


def fit(folder, config_text: str | None) -> None:
    Trainer(
        max_epochs=1,
        callbacks=[RunRecord(str(folder), config_text)],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(ToyModule(batches=1))


def test_configuration_and_environment_are_written_without_secrets(tmp_path):
    fit(tmp_path, "seed: 1\nreward:\n  api_key: planted\n")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"seed": 1, "reward": {"api_key": "***"}}
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["packages"]["torch"] == torch.__version__
    assert record["packages"]["lightning"] == lightning.__version__
    assert record["strategy"] == "SingleDeviceStrategy"
    assert (record["world_size"], record["precision"]) == (1, "32-true")
    assert set(record["packages"]) == {"frpo", "torch", "lightning", "transformers", "peft", "mlflow"}


def test_a_changed_configuration_keeps_the_earlier_one(tmp_path):
    for text in ("steps: 1\n", "steps: 1\n", "steps: 2\n", None):
        fit(tmp_path, text)
    assert (tmp_path / "config.yaml").read_text() == "steps: 2\n"
    assert (tmp_path / "config.1.yaml").read_text() == "steps: 1\n"
    assert not (tmp_path / "config.2.yaml").exists()


def test_the_revision_says_whether_the_tree_is_dirty(tmp_path):
    assert git_revision(tmp_path) == {"revision": "unknown", "dirty": None}
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@e"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    clean = git_revision(tmp_path)
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {**clean, "dirty": True}


def test_no_git_at_all_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path)["revision"] == "unknown"
