"""The checkpoint files of a run: which is the newest, and which are whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

LAST = "last.ckpt"


def latest(path: Path | str) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none.

    ``path`` is a run's output folder, its ``checkpoints`` folder, or a checkpoint, which is returned if whole. A file
    that a crash or a full disk cut short, or whose bytes changed on the disk, is passed over.
    """
    return next((file for file in newest_first(path) if is_whole(file)), None)


def newest_first(path: Path | str) -> list[Path]:
    """The checkpoints of a run, whole or not; ``last.ckpt`` before another name of the same file."""
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = (file for file in folder.glob("*.ckpt") if file.is_file())
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name == LAST), reverse=True)


def is_whole(path: Path) -> bool:
    """Whether every record of a checkpoint is there and fits its checksum; reads the file once, about 1 GB a second.

    Loading alone would not tell: torch maps the file and does not look at the checksums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # what a damaged file raises depends on where it is damaged
        return False
