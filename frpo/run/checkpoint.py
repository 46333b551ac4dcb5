"""When to save a checkpoint, and which one to resume from."""

from __future__ import annotations

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from frpo.foundation import require
from frpo.run.checkpoint_files import LAST, latest
from frpo.run.checkpoint_io import PARTIAL, AtomicCheckpointIO, save_error
from frpo.run.stopping import StopRequest

__all__ = ["LAST", "Checkpoint", "latest"]


class Checkpoint(ModelCheckpoint):
    """Saves ``<output_dir>/checkpoints/step=<global_step>.ckpt`` and keeps ``last.ckpt`` equal to the newest.

    Unlike its parent it

    - saves whenever ``global_step`` has passed a multiple of ``every_n_train_steps`` (a rollout may take several
      optimiser steps and jump over the multiple), and at the end of training;
    - saves after the validation of a step where one is due: a checkpoint taken before it would resume behind it, and
      a validation interrupted by a kill would never be run;
    - writes whole files or none, and gives ``last.ckpt`` as a second name of the same file;
    - at SIGTERM or Ctrl-C finishes the batch in hand, saves that step and raises Lightning's ``SIGTERMException``. A
      validation that was due or under way is run by the resumed fit. With several ranks it is enough that one got the
      signal, and a validation under way is finished first. The last batch of a run is not stopped after: the run ends.
      A second Ctrl-C stops at once, without saving.

    Args:
        output_dir: Folder of the run.
        every_n_train_steps: Optimiser steps between checkpoints.
        save_top_k: How many ``step=*.ckpt`` to keep: the newest without ``monitor``, the best by ``monitor`` otherwise;
            0 keeps ``last.ckpt`` alone, -1 all. While one is written there is one more. With 2, the default, a run
            whose newest file is damaged goes on from the one before; 1 halves the disk space and has none before.
        monitor: Logged metric to rank checkpoints by, ``val/reward`` say; None keeps the newest.
        mode: Whether ``max`` or ``min`` of ``monitor`` is best.

    Raises:
        ValueError: ``every_n_train_steps`` below 1.
        OSError: at the start, a checkpoint folder that cannot be written; later, a full disk. The message says which
            file, how much space is left, and which checkpoints are whole.
    """

    def __init__(
        self,
        output_dir: str,
        every_n_train_steps: int = 50,
        save_top_k: int = 2,
        monitor: str | None = None,
        mode: str = "max",
    ) -> None:
        hint = "the optimiser steps between checkpoints; to save at the end alone write a number above max_steps"
        require.number("Checkpoint.every_n_train_steps", every_n_train_steps, at_least=1, hint=hint)
        super().__init__(
            dirpath=Path(output_dir) / "checkpoints",
            filename="step={step:06d}",
            auto_insert_metric_name=False,
            # Lightning ranks by a metric alone; the newest are the best by step.
            monitor=monitor or "step",
            mode=mode if monitor else "max",
            save_top_k=save_top_k,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._every = every_n_train_steps
        self._due = False
        self._request = StopRequest()
        self._stopping = False
        self._validation_left = False
        self._loops: dict[str, Any] | None = None

    @property
    def stopped_by(self) -> signal.Signals | None:
        """The signal that this process got while it trained, None for none."""
        return self._request.received

    @property
    def state_key(self) -> str:
        """One key whatever the settings, so that a resumed run may change them."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the folder before the first step costs anything, and remove what a killed save left."""
        if stage == "fit":
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            if trainer.is_global_zero:
                _prepare(self._folder)
        super().setup(trainer, pl_module, stage)
        self.last_model_path = str(self._folder / LAST)

    def state_dict(self) -> dict[str, Any]:
        """What to keep in mind about the files, and whether the validation of this step is still to be run."""
        return {**super().state_dict(), "mode": self.mode, "validation_left": self._validation_left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same files."""
        super().load_state_dict(state_dict)
        if (state_dict["monitor"], state_dict.get("mode", self.mode)) != (self.monitor, self.mode):
            # Values of two metrics cannot be ranked; the files stay.
            self.best_k_models, self.kth_best_model_path = {}, ""
        self._validation_left = state_dict.get("validation_left", False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Where a validation is left, the place in training is that before it, whenever it was left."""
        if self._validation_left and self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The validation that the checkpoint owes may be left once more."""
        self._loops = deepcopy(checkpoint["loops"]["fit_loop"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing needs saving before a step is taken, fresh or resumed; a stopped run may owe a validation."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._stopping = False
        self._keep_no_more(trainer)
        self._request.listen(says=trainer.is_global_zero)
        if self._validation_left:
            _validate(trainer)
            self._validation_left = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop here where the batch before was to be the last: its metrics are logged by now."""
        self._stop_if_agreed()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save now, or after the validation that follows."""
        passed = trainer.global_step // self._every > self._last_global_step_saved // self._every
        # Saved in on_train_end, the last step would count its epoch as complete, and a longer run would skip the rest.
        stops = _stops(trainer)
        self._stopping = not _ends(trainer) and self._agree(trainer)
        self._due = self._due or passed or stops or self._stopping
        follows = _validation_follows(trainer)
        # A resume from within the validation after an epoch's last batch would find no batch to go on with, for ever.
        self._loops = deepcopy(trainer.fit_loop.state_dict()) if follows else None
        if self._stopping and follows:
            self._leave_validation(trainer)
        elif self._due and not follows:
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation to the resumed run."""
        if self._training(trainer):
            self._stop_if_agreed()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave an unfinished validation to the resumed run. Ranks may differ in batches, so one alone does this."""
        asked = trainer.world_size == 1 and self._training(trainer) and self._request.received is not None
        if asked and not _ends(trainer):
            self._stopping = True
            self._leave_validation(trainer)
            self._stop_if_agreed()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until the validation was done."""
        if not self._training(trainer):
            return
        self._validation_left = False
        self._stopping = not _ends(trainer) and self._agree(trainer)
        if self._due or self._stopping:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps decide, not epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps since the last checkpoint."""
        self._save(trainer)

    @staticmethod
    def _training(trainer: Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _agree(self, trainer: Trainer) -> bool:
        """Whether any rank is to stop. Every rank asks at the same places."""
        return bool(trainer.strategy.reduce_boolean_decision(self._request.received is not None, all=False))

    def _leave_validation(self, trainer: Trainer) -> None:
        self._validation_left = True
        self._save(trainer)

    def _stop_if_agreed(self) -> None:
        if self._stopping:
            raise SIGTERMException

    def _keep_no_more(self, trainer: Trainer) -> None:
        """Remove what a ``save_top_k`` smaller than before the resume does not keep: Lightning removes one for one."""
        best = min if self.mode == "min" else max
        worst = max if self.mode == "min" else min
        while len(self.best_k_models) > self.save_top_k >= 0:
            path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            del self.best_k_models[path]
            self._remove_checkpoint(trainer, path)
        if self.best_k_models:
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.best_model_path = best(self.best_k_models, key=self.best_k_models.__getitem__)

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        # A module may log `step` as the axis of its metrics, and the file would be named after that.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _save(self, trainer: Trainer) -> None:
        self._due = False
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is None or self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        last = self._folder / LAST
        linked = False
        if self._last_global_step_saved == trainer.global_step and trainer.is_global_zero:
            linked = _link(Path(self._last_checkpoint_saved), last)
        if not trainer.strategy.broadcast(linked):
            self._save_checkpoint(trainer, str(last))


def _prepare(folder: Path) -> None:
    probe = folder / f"probe{PARTIAL}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
    except OSError as error:
        raise save_error(folder / LAST, error) from error
    for leftover in folder.glob(f"*{PARTIAL}"):
        leftover.unlink()


def _link(source: Path, name: Path) -> bool:
    """Make ``name`` a second name of ``source`` in one step; False where the file system cannot."""
    partial = name.with_name(name.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        os.link(source, partial)
    except OSError:
        # No hard links here: the caller saves a second time instead.
        return False
    os.replace(partial, name)
    return True


def _stops(trainer: Trainer) -> bool:
    """Whether training ends with the batch in hand for its number of steps, or because a callback said so."""
    return trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step


def _ends(trainer: Trainer) -> bool:
    """Whether training ends with the batch in hand for any reason."""
    epochs = trainer.max_epochs
    return _stops(trainer) or (
        epochs is not None and 0 <= epochs <= trainer.current_epoch + 1 and trainer.is_last_batch
    )


def _validate(trainer: Trainer) -> None:
    """Run the validation loop of the fit, as the fit does after a batch."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates right after this batch."""
    batches = trainer.num_val_batches
    some = sum(batches) if isinstance(batches, list) else batches
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return bool(trainer.enable_validation and some and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
