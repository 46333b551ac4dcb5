"""A small configuration in a folder of its own, and the command as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import frpo.cli.training

BASE = """
name: small
trainer:
  accelerator: cpu
  max_steps: 4
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: frpo.run.checkpoint.Checkpoint
      init_args: {output_dir: "${output_dir}", every_n_train_steps: 2}
model:
  class_path: cli_fakes.Line
  init_args:
    shape: {class_path: cli_fakes.Square, init_args: {side: 2}}
    extra: {rank: 3}
    label: ${output_dir}/label
data: {class_path: cli_fakes.Points}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``base.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frpo"])
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


@pytest.fixture
def frpo(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit status, standard output, standard error."""
    from frpo.__main__ import main

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(list(args))
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(folder: Path, frpo: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """What ``frpo fit --config base.yaml ...`` says when it refuses: a short message and exit status 2."""

    def run(*args: str) -> str:
        status, _, err = frpo("fit", "--config", "base.yaml", *args)
        assert status == 2, err
        message = err[err.index("frpo fit: error:") :]
        assert "usage:" not in err
        assert "Traceback" not in err
        assert len(message.splitlines()) <= 10, message
        return message

    return run
