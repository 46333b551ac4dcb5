"""Every completion of every step, validation and test, in one table that a kill and a resume leave exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from frpo.foundation.durable import free_name, write_whole
from frpo.foundation.redaction import redact_text
from frpo.run.completions import FOLDER, Parts, Row
from frpo.run.tracker import MLflowTracker
from frpo.types import StepRecord


class CompletionTable(Callback):
    """Writes the rows of ``pl_module.last_step`` to ``<output_dir>/completions/``; see ``read_completions``.

    A row reaches the operating system before its step ends and the disk before a checkpoint that follows it. Each rank
    writes its own parts. On a resume the rows that will be produced again (from the checkpoint's step on) and a torn
    last line are removed first; a fresh run in the same folder moves an earlier table aside; an evaluation repeated at
    the same step replaces the earlier one. The sanity check before training is not recorded.

    With an :class:`~frpo.run.tracker.MLflowTracker` rank 0 stores every closed part once as an artifact under
    ``completions/``, and the last one when the run ends or fails.

    Args:
        output_dir: Folder of the run.
        upload_every_n_steps: Training rollouts in one part.
    """

    def __init__(self, output_dir: str, upload_every_n_steps: int = 50) -> None:
        if upload_every_n_steps < 1:
            raise ValueError(
                f"upload_every_n_steps: got {upload_every_n_steps}, expected at least 1 rollout a part; write 50"
            )
        self.folder = Path(output_dir) / FOLDER
        self._rollouts_per_part = upload_every_n_steps
        self._parts: Parts | None = None
        self._rollouts_in_part = 0
        self._checkpoint_step = 0
        self._held: set[tuple[str, int]] = set()
        self._evaluating: tuple[str, int] | None = None
        self._last: StepRecord | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that draws no completions.

        Raises:
            ValueError: the module has no ``last_step``.
        """
        if not hasattr(pl_module, "last_step"):
            raise ValueError(
                f"CompletionTable: got a {type(pl_module).__name__}, expected a module that draws completions and "
                "leaves them in last_step (PolicyOptimization does); remove the callback for this one"
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the weights: outside fit the trainer does not."""
        self._checkpoint_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what this fit will produce again."""
        if self._parts is None and trainer.global_step == 0:
            if trainer.is_global_zero and self.folder.is_dir():
                self.folder.rename(free_name(self.folder))
            trainer.strategy.barrier("completions moved aside")
        self._open(trainer)
        step = trainer.global_step
        assert self._parts is not None
        # A checkpoint is taken after the validation of its step, and that one is not run again.
        self._held = self._parts.keep(
            lambda row: row["step"] < step or (row["step"] == step and row["stage"] != "train")
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record the rollout of this step."""
        self._write(trainer, pl_module)
        self._rollouts_in_part += 1
        if self._rollouts_in_part >= self._rollouts_per_part:
            self._close_part(trainer, everything=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new evaluation begins."""
        self._evaluating = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new evaluation begins."""
        self._evaluating = None

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record a validation batch."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record a test batch."""
        self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rows before the checkpoint are safe before the checkpoint is."""
        if self._parts is not None:
            self._parts.sync()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the parts of a checkpoint that had nothing left to do stored, if its process had no time to."""
        if trainer.global_step > 0:
            self._open(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close and store what there is."""
        try:
            self._close_part(trainer, everything=True)
        except OSError as error:
            exception.add_note(f"The last completions were not stored: {error}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close and store the last part."""
        trainer.strategy.barrier("completions written")
        self._close_part(trainer, everything=True)

    def _open(self, trainer: Trainer) -> Parts:
        if self._parts is None:
            self._parts = Parts(self.folder, trainer.global_rank)
        return self._parts

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record: StepRecord | None = pl_module.last_step  # type: ignore[assignment]
        if record is None or record is self._last:
            return
        self._last = record
        fresh_process = self._parts is None
        parts = self._open(trainer)
        step = record.step
        if record.stage != "train":
            if trainer.state.fn != TrainerFn.FITTING:
                step = max(step, self._checkpoint_step)
            if fresh_process:
                self._held = parts.keep(lambda row: True)
            self._start_evaluation(parts, record.stage, step)
        parts.append(rows_of(record, step))

    def _start_evaluation(self, parts: Parts, stage: str, step: int) -> None:
        if self._evaluating == (stage, step):
            return
        self._evaluating = (stage, step)
        if self._evaluating in self._held:
            parts.keep(lambda row: (row["stage"], row["step"]) != (stage, step))
        self._held.add((stage, step))

    def _close_part(self, trainer: Trainer, everything: bool) -> None:
        """Close this rank's part; rank 0 stores what is closed, and ``everything`` at the end."""
        if self._parts is None:
            return
        number = self._parts.number
        self._parts.close()
        self._rollouts_in_part = 0
        tracker = next((log for log in trainer.loggers if isinstance(log, MLflowTracker)), None)
        if tracker is None or not trainer.is_global_zero:
            return
        stored_file = self.folder / "stored.json"
        stored = json.loads(stored_file.read_text()) if stored_file.is_file() else {}
        sizes: dict[str, int] = stored.get("sizes", {}) if stored.get("run") == tracker.run_key else {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            rank, part_number = (int(text) for text in part.stem.split("-")[1:])
            # Another rank may not have closed the part of this number yet.
            closed = rank == trainer.global_rank or part_number < number
            size = part.stat().st_size
            if (everything or closed) and sizes.get(part.name) != size:
                tracker.log_artifact(part, FOLDER)
                sizes[part.name] = size
        write_whole(stored_file, json.dumps({"run": tracker.run_key, "sizes": sizes}))


def rows_of(record: StepRecord, step: int) -> list[Row]:
    """The rows of one batch: stage, step, the prompt's running position, and the columns of the scored batch."""
    positions = record.scored.rollout.prompts.position.tolist()
    group = record.scored.rewards.shape[1]
    return [
        {
            "stage": record.stage,
            "step": step,
            "position": positions[i // group],
            **row,
            # A judge's complaint may quote the address it was asked at.
            "reason": redact_text(row["reason"]),
        }
        for i, row in enumerate(record.scored.records())
    ]
