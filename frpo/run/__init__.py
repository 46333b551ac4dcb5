"""What a run leaves: checkpoints, completions, metrics, its record, and their mirror in MLflow.

Importing this package costs neither Lightning nor MLflow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Checkpoint": "frpo.run.checkpoint",
    "CompletionTable": "frpo.run.completion_table",
    "EndTogether": "frpo.run.end_together",
    "MLflowTracker": "frpo.run.tracker",
    "MetricsCSV": "frpo.run.metrics_csv",
    "Progress": "frpo.run.progress",
    "RunRecord": "frpo.run.run_record",
    "latest": "frpo.run.checkpoint_files",
    "read_completions": "frpo.run.completions",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'frpo.run' has no attribute {name!r}")
