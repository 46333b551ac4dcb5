"""Fine-tuning Robust Policy Optimization on Lightning. Importing ``frpo`` imports neither torch nor Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "FRPO": "frpo.objectives",
    "GRPO": "frpo.objectives",
    "Naive": "frpo.estimators",
    "Jackknife": "frpo.estimators",
    "Constant": "frpo.schedules",
    "Linear": "frpo.schedules",
    "Cosine": "frpo.schedules",
    "AdaptiveKL": "frpo.schedules",
    "PolicyOptimization": "frpo.modules.policy_optimization",
    "PromptDataModule": "frpo.data.prompts.module",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'frpo' has no attribute {name!r}")
