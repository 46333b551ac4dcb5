"""A study as an MLflow run: the parent of every cell's run, and the place of its report."""

from __future__ import annotations

import fcntl
import inspect
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError, suggestion
from frpo.run.tracker import MLflowTracker
from frpo.study.folder import Readable
from frpo.study.spec import StudySpec, Tree

KEYS = "mlflow.json"
PARENT_TAG = "mlflow.parentRunId"
FROM_THE_STUDY = ("output_dir", "run_name")


def tracking_settings(spec: StudySpec) -> Tree | None:
    """Settings of the study's tracker, with ``${oc.env:...}`` filled in; None where it has none.

    Raises:
        ConfigError: a key that the tracker does not take, or a variable that is not set.
    """
    if spec.tracking is None:
        return None
    known = [name for name in inspect.signature(MLflowTracker).parameters if name not in FROM_THE_STUDY]
    for key in spec.tracking:
        if key not in known:
            raise ConfigError(f"study {spec.name}: tracking: {key}: unknown key{suggestion(str(key), known)}")
    try:
        filled: Any = OmegaConf.to_container(OmegaConf.create(spec.tracking), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"study {spec.name}: tracking: {str(error).splitlines()[0]}") from error
    return dict(filled)


def open_parent(name: str, tracking: Tree, study: Path) -> tuple[MLflowTracker, Tree]:
    """Open the run of the study ``name``, or the one an earlier call opened.

    Returns it and the settings of the cells' trackers. Where no server answers, the cells are told apart by the tag
    ``frpo.study`` alone. Several calls at once open one run.
    """
    tags = {**tracking.get("tags", {}), "frpo.study": name}
    tracker = MLflowTracker(**{**tracking, "output_dir": str(study), "run_name": name, "tags": tags})
    keys = study / KEYS
    with (study / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Readable(keys):
            known = dict(json.loads(keys.read_bytes())) if keys.is_file() else {}
        tracker.begin(known.get("run_key"), known.get("run_id"))
        write_whole(keys, json.dumps({"run_key": tracker.run_key, "run_id": tracker.run_id}) + "\n")
    parent = {} if tracker.run_id is None else {PARENT_TAG: tracker.run_id}
    return tracker, {**tracking, "tags": {**tags, **parent}}


def close_parent(tracker: MLflowTracker, files: list[Path], status: str | None) -> None:
    """Store the report with the study's run and close it as ``status``; None leaves it open for other calls."""
    for file in files:
        tracker.log_artifact(file, "report")
    if status is not None:
        tracker.finalize(status)
