"""The table of completions: append-only JSON-lines parts on disk, one row a completion."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from frpo.foundation.durable import cut_torn_line, disk_error, write_whole

Row = dict[str, Any]
FOLDER = "completions"
# Validation and test at a step see the weights before the rollout of that step.
_STAGE_ORDER = {"val": 0, "test": 1, "train": 2}


def read_completions(path: Path | str) -> Iterator[Row]:
    """Yield every completion of a run, oldest first.

    ``path`` is a run's output folder or its ``completions`` folder. Each row holds ``stage`` (train, val or test),
    ``step`` (optimiser steps taken when it was drawn), ``position`` (the prompt's running number), ``sample`` (its
    place in the group) and the columns of :meth:`frpo.types.ScoredBatch.records`. Rows of several ranks are merged by
    step and position. A last line that is still being written is left out.

    Raises:
        FileNotFoundError: no table there.
        ValueError: a damaged line, named by file and number.

    Example: ``pandas.DataFrame(read_completions("outputs/run"))``.
    """
    folder = Path(path)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    ranks: dict[str, list[Path]] = {}
    for part in sorted(folder.glob("part-*.jsonl")):
        ranks.setdefault(part.name.split("-")[1], []).append(part)
    if not ranks:
        raise FileNotFoundError(
            f"no completions in {folder}: expected part-*.jsonl; give a run's output folder, recorded with the "
            "CompletionTable callback"
        )
    return heapq.merge(*(_rows(parts) for parts in ranks.values()), key=_order)


def _rows(parts: Iterable[Path]) -> Iterator[Row]:
    for part in parts:
        with part.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield _row(line, part, number)


def _row(line: str, part: Path, number: int) -> Row:
    try:
        row = json.loads(line)
        places = (row["step"], row["position"], row["sample"])
        if not all(type(place) is int for place in places):
            raise TypeError("step, position and sample must be whole numbers")
        _order(row)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{part}, line {number}: damaged ({type(error).__name__}: {error}), expected one completion as JSON; "
            "the file was changed after the run wrote it: drop the line, or record the run again"
        ) from error
    return dict(row)


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _order(row: Row) -> tuple[int, int, int, int]:
    return row["step"], _STAGE_ORDER[row["stage"]], row["position"], row["sample"]


class Parts:
    """One rank's parts of the table, ``part-<rank>-<number>.jsonl``: the last one open, the others closed.

    Rows reach the operating system at every :meth:`append` (a killed process loses none) and the disk at :meth:`sync`.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._rank = folder, rank
        self._file: BinaryIO | None = None
        self._path: Path | None = None

    @property
    def open_part(self) -> Path | None:
        """The part being written, None between parts."""
        return self._path

    @property
    def number(self) -> int:
        """The number of the part being written or last written, -1 before the first."""
        existing = self.existing()
        return int(existing[-1].stem.split("-")[2]) if existing else -1

    def existing(self) -> list[Path]:
        """This rank's parts on disk, in order."""
        return sorted(self.folder.glob(f"part-{self._rank:05d}-*.jsonl"))

    def append(self, rows: list[Row]) -> None:
        """Write rows to the open part, opening the next one if none is."""
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._path = self.folder / f"part-{self._rank:05d}-{self.number + 1:05d}.jsonl"
                # Unbuffered: after a full disk nothing is left to fail a second time on closing.
                self._file = self._path.open("ab", buffering=0)
            data = memoryview(_lines(rows).encode())
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise disk_error(self._path or self.folder, error) from error

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the open part, if any, safely on disk."""
        if self._file is not None:
            self.sync()
            self._file.close()
        self._file = self._path = None

    def keep(self, wanted: Callable[[Row], bool]) -> set[tuple[str, int]]:
        """Drop this rank's rows that are not ``wanted``, and a torn last line; return the (stage, step) pairs left.

        A part keeps its name even when nothing of it is left, so that a copy elsewhere is replaced.
        """
        self.close()
        left: set[tuple[str, int]] = set()
        for part in self.existing():
            cut_torn_line(part)
            rows = list(_rows([part]))
            kept = [row for row in rows if wanted(row)]
            left |= {(row["stage"], row["step"]) for row in kept}
            if len(kept) < len(rows):
                write_whole(part, _lines(kept))
        return left
