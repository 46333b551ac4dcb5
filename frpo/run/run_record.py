"""What produced a run: configuration, code revision, package versions, devices; and which MLflow run it is."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from frpo.foundation.durable import free_name, write_whole
from frpo.foundation.redaction import redact_config
from frpo.run.metrics_csv import MetricsCSV
from frpo.run.tracker import MLflowTracker

_PACKAGES = ("frpo", "torch", "lightning", "transformers", "peft", "mlflow")
_GIT_SECONDS = 10


class RunRecord(Callback):
    """Records a run at its start and continues the same MLflow run after a resume.

    Writes ``config.yaml`` and ``environment.json`` to ``output_dir`` and, where the trainer has an
    :class:`~frpo.run.tracker.MLflowTracker`, as artifacts and tags. The run's key and id travel in the checkpoint;
    without this callback a resumed run is a new one to MLflow. A configuration that a resumed run changed replaces
    ``config.yaml``; the earlier one becomes ``config.1.yaml``. Secrets are replaced by ``***`` everywhere.

    Args:
        output_dir: Folder of the run.
        config_text: The resolved configuration as YAML; the command line sets this attribute. None records none.
    """

    def __init__(self, output_dir: str, config_text: str | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.config_text = config_text
        self._tracker: MLflowTracker | None = None
        self._run_key: str | None = None
        self._run_id: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the local files; a fit that fails before its first step leaves them too."""
        self._tracker = next((log for log in trainer.loggers if isinstance(log, MLflowTracker)), None)
        if not trainer.is_global_zero or stage != "fit":
            return
        write_whole(
            self.output_dir / "environment.json", json.dumps(environment(trainer), indent=2, sort_keys=True) + "\n"
        )
        config = self._config()
        if config is not None:
            path = self.output_dir / "config.yaml"
            if path.is_file() and path.read_text(encoding="utf-8") != config:
                path.rename(free_name(path))
            write_whole(path, config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open or continue the run: only now has every strategy read its checkpoint."""
        resumed = trainer.global_step > 0
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.begin(resumed)
        self._begin(rerun=resumed)
        if self._tracker is None or not trainer.is_global_zero:
            return
        record = environment(trainer)
        folder = f"resumed-{trainer.global_step}/" if resumed else ""
        self._tracker.log_text(json.dumps(record, indent=2, sort_keys=True), f"{folder}environment.json")
        self._tracker.log_tags(_tags(record))
        config = self._config()
        if config is not None:
            self._tracker.log_text(config, f"{folder}config.yaml")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run of a checkpoint that had nothing left to do: its process was killed after the last step."""
        self._begin(rerun=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a validation on its own into the run its checkpoint names."""
        if not trainer.sanity_checking:
            self._begin(rerun=False)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a test into the run its checkpoint names."""
        self._begin(rerun=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell a run that was stopped from one that failed."""
        if self._tracker is not None and isinstance(exception, SIGTERMException | KeyboardInterrupt):
            self._tracker.stopped()

    def state_dict(self) -> dict[str, Any]:
        """The run's key and, once a server has answered, its id."""
        if self._tracker is None:
            return {}
        return {"run_key": self._tracker.run_key, "run_id": self._tracker.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the key and id of the run that wrote the checkpoint."""
        self._run_key, self._run_id = state_dict["run_key"], state_dict["run_id"]

    def _begin(self, rerun: bool) -> None:
        if self._tracker is not None:
            self._tracker.begin(self._run_key, self._run_id, rerun)

    def _config(self) -> str | None:
        return None if self.config_text is None else redact_config(self.config_text)


def environment(trainer: Trainer) -> dict[str, Any]:
    """Code revision, package versions, devices and strategy of this process, JSON-ready."""
    return {
        "git": git_revision(Path.cwd()),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "accelerator": type(trainer.accelerator).__name__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": trainer.num_devices,
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
    }


def git_revision(folder: Path) -> dict[str, Any]:
    """``{"revision": <hash>, "dirty": <bool>}`` of the repository around ``folder``, ``unknown`` without one."""
    head = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if head is None or changes is None:
        return {"revision": "unknown", "dirty": None}
    return {"revision": head, "dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        # No git, no repository, or no commit yet: the record says unknown.
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _tags(record: dict[str, Any]) -> dict[str, str]:
    return {
        "git.revision": record["git"]["revision"],
        "git.dirty": str(record["git"]["dirty"]),
        "device": record["device"],
        "strategy": record["strategy"],
        "world_size": str(record["world_size"]),
        **{f"version.{name}": number for name, number in record["packages"].items()},
    }
