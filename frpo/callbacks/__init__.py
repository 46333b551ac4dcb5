"""Callbacks of a run: its record, its completions, its evaluations, its console, its checkpoints."""

from __future__ import annotations

from frpo.callbacks.checkpoint import Checkpoint, latest
from frpo.callbacks.completion_table import CompletionTable
from frpo.callbacks.end_together import EndTogether
from frpo.callbacks.evaluation import Evaluation
from frpo.callbacks.progress import Progress
from frpo.callbacks.run_record import RunRecord

__all__ = ["Checkpoint", "CompletionTable", "EndTogether", "Evaluation", "Progress", "RunRecord", "latest"]
