"""Files that are whole or absent, and disk errors that say what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class DiskError(OSError):
    """The disk refused a file; the message says what to do."""


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the disk refused, in the words of :func:`disk_error`.
    """
    # Its own name for each process: several may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def cut_torn_line(path: Path) -> int:
    """Cut a last line that a killed process left without its newline; return the bytes removed."""
    if not path.is_file():
        return 0
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
        return size - end


def free_name(path: Path) -> Path:
    """The first of ``name.1.suffix``, ``name.2.suffix``, ... beside ``path`` that does not exist."""
    n = 1
    while (name := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists():
        n += 1
    return name


def disk_error(path: Path | str, error: OSError, remedy: str = "") -> DiskError:
    """An error that says which file, how much space is left, and what to do about it; ``errno`` is kept."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    advice = remedy or "free space there, make the folder writable, or choose another output_dir"
    reason = error.strerror or str(error)
    message = f"cannot write {path}: {reason} ({free:,} bytes free in {folder}); {advice}"
    return DiskError(error.errno, message) if error.errno is not None else DiskError(message)
