"""Events that no server has accepted yet, kept on disk in order until one does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from frpo.foundation.durable import cut_torn_line, disk_error, write_whole

Event = dict[str, Any]
SPOOL_NAME = "mlflow_spool.jsonl"


class Spool:
    """A JSON-lines queue that outlives its process.

    Beside ``<name>.jsonl`` lie ``<name>.state.json`` (how many bytes were accepted, and the server's run id of each run
    key), ``<name>.rejected.jsonl`` (what the server understood and refused, with its reason) and ``<name>.lock``. An
    event counts as accepted only after :meth:`accepted`; a crash between the two delivers it again.

    Raises:
        ValueError: another living process has the same spool open, or its state is damaged; :meth:`waiting` raises it
            where an event is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state_path = path.with_suffix(".state.json")
        self._rejected_path = path.with_suffix(".rejected.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path.with_suffix(".lock"))
        cut_torn_line(path)
        self._accepted, self._runs = _read_state(self._state_path) if self._state_path.is_file() else (0, {})
        size = path.stat().st_size if path.is_file() else 0
        if self._accepted > size:
            # A crash fell between the two steps of emptying, which cuts the file before it resets the count.
            self._accepted = 0
            self._save_state()

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return self.path.is_file() and self.path.stat().st_size > self._accepted

    def __len__(self) -> int:
        """How many events wait."""
        return sum(1 for _ in self.waiting())

    def append(self, event: Event) -> None:
        """Put ``event`` at the end, safely on disk."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(self.path, error) from error

    def waiting(self) -> Iterator[tuple[Event, int]]:
        """The waiting events in order, each with the mark to hand to :meth:`accepted`."""
        if not self:
            return
        with self.path.open("rb") as file:
            file.seek(self._accepted)
            for line in iter(file.readline, b""):
                yield _event(line, self.path, file.tell()), file.tell()

    def accepted(self, mark: int) -> None:
        """Everything up to ``mark`` was delivered; an empty queue gives its disk space back."""
        self._accepted = mark
        if not self:
            os.truncate(self.path, 0)
            self._accepted = 0
        self._save_state()

    def reject(self, event: Event, reason: str) -> Path:
        """Put aside an event that the server will never take; return the file it lies in."""
        try:
            with self._rejected_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"reason": reason, "event": event}) + "\n")
        except OSError as error:
            raise disk_error(self._rejected_path, error) from error
        return self._rejected_path

    def run_id(self, run: str) -> str | None:
        """The server's id of the run with this key, once known."""
        return self._runs.get(run)

    def remember(self, run: str, run_id: str) -> None:
        """Keep the server's id of a run."""
        if self._runs.get(run) != run_id:
            self._runs[run] = run_id
            self._save_state()

    def close(self) -> None:
        """Let another process open the spool."""
        self._lock.close()

    def _save_state(self) -> None:
        write_whole(self._state_path, json.dumps({"accepted": self._accepted, "runs": self._runs}))


def _read_state(path: Path) -> tuple[int, dict[str, str]]:
    try:
        state = json.loads(path.read_bytes())
        accepted, runs = state["accepted"], state["runs"]
        if type(accepted) is not int or accepted < 0:
            raise TypeError("accepted must be a number of bytes")
        return accepted, {str(run): str(run_id) for run, run_id in runs.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}), expected what was delivered of the spool beside it; "
            "remove it to deliver the whole spool again"
        ) from error


def _event(line: bytes, path: Path, end: int) -> Event:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: the event before byte {end} is damaged ({type(error).__name__}: {error}), expected a JSON object "
            "a line; drop the line to deliver the rest"
        ) from error


def _lock(path: Path) -> IO[str]:
    file = path.open("a")
    try:
        # A record lock: unlike flock it is not inherited by data-loading workers that outlive a killed trainer.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(
                f"{path.parent} is in use by another process that records a run there; "
                "wait for it to end, or give this run another output_dir"
            ) from error
        # A file system without locks: go on unguarded.
    return file
