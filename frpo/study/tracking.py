"""The study as an MLflow run: the parent of every cell's run, and the place of its report."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from frpo.foundation.durable import write_whole
from frpo.run.tracker import MLflowTracker
from frpo.study.folder import readable
from frpo.study.spec import StudySpec, Tree

KEYS = "mlflow.json"
PARENT_TAG = "mlflow.parentRunId"


def open_parent(spec: StudySpec, study: Path) -> tuple[MLflowTracker | None, Tree | None]:
    """Open the study's run, or the one an earlier call opened; returns it and the settings of the cells' trackers.

    Where no server answers, the cells are told apart by the tag ``frpo.study`` alone. Several calls at once open one.
    """
    if spec.tracking is None:
        return None, None
    tags = {**spec.tracking.get("tags", {}), "frpo.study": spec.name}
    tracker = MLflowTracker(**{**spec.tracking, "output_dir": str(study), "run_name": spec.name, "tags": tags})
    keys = study / KEYS
    with (study / "mlflow.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with readable(keys):
            known = dict(json.loads(keys.read_bytes())) if keys.is_file() else {}
        tracker.begin(known.get("run_key"), known.get("run_id"))
        write_whole(keys, json.dumps({"run_key": tracker.run_key, "run_id": tracker.run_id}) + "\n")
    parent = {} if tracker.run_id is None else {PARENT_TAG: tracker.run_id}
    return tracker, {**spec.tracking, "tags": {**tags, **parent}}


def close_parent(tracker: MLflowTracker | None, files: list[Path], status: str | None) -> None:
    """Store the report with the study's run and close it as ``status``; None leaves it open for other calls."""
    if tracker is None:
        return
    for file in files:
        tracker.log_artifact(file, "report")
    if status is not None:
        tracker.finalize(status)
