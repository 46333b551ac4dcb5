"""What a run leaves behind: an MLflow logger that outlives its server, metrics.csv, completions, no secrets.

Importing this package costs neither Lightning nor MLflow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "MLflowTracker": "frpo.tracking.tracker",
    "MetricsCSV": "frpo.tracking.metrics_csv",
    "read_completions": "frpo.tracking.completions",
    "redact": "frpo.tracking.redaction",
    "redact_config": "frpo.tracking.redaction",
    "redact_text": "frpo.tracking.redaction",
    "replay": "frpo.tracking.command",
    "replay_command": "frpo.tracking.command",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'frpo.tracking' has no attribute {name!r}")
