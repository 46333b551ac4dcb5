"""Checkpoint files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from frpo.foundation.durable import DiskError, disk_error

PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes ``<name>.partial`` beside the checkpoint, forces it to the disk, then renames it over ``<name>``.

    Lightning's own writer prepares the file in the system's temporary folder and moves it: across file systems that
    move is a copy over the previous checkpoint, which a full disk or a kill leaves half-written; and a small temporary
    folder stops a checkpoint that the target disk has room for.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` to the local ``path``.

        Raises:
            OSError: the disk refused; what stood at ``path`` before still does.
        """
        assert storage_options is None, "a local file has no storage options"
        target = Path(path)
        partial = target.with_name(target.name + PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                _write(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            _sync_folder(target.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise save_error(target, error) from error


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch closes its archive after a write that failed, and raises what goes wrong there instead.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_error(target: Path, error: OSError) -> DiskError:
    """The error of a failed save, saying which checkpoint is still good."""
    remedy = "free space there or choose another output_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make the folder writable or choose another output_dir"
    kept = sorted(target.parent.glob("*.ckpt")) if target.parent.is_dir() else []
    whole = f"earlier checkpoints are whole ({', '.join(path.name for path in kept)})" if kept else ""
    return disk_error(target, error, f"{remedy}, then resume{': ' if whole else ''}{whole}")
