"""How far a study is: read from its folder, so that any process can tell."""

from __future__ import annotations

import csv
import fcntl
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from frpo.study.cells import DONE, FAILED, Cell, cells_folder
from frpo.study.folder import readable
from frpo.study.one import LOCK

State = Literal["done", "running", "failed", "left"]
STATES: tuple[State, ...] = ("done", "running", "failed", "left")


def state_of(study: Path, cell: Cell) -> State:
    """Whether a cell is done, running in some process, failed, or left to do."""
    folder = cells_folder(study) / cell.id
    if (folder / DONE).is_file():
        return "done"
    if is_locked(folder):
        return "running"
    return "failed" if (folder / FAILED).is_file() else "left"


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a cell's folder."""
    file = folder / LOCK
    if not file.is_file():
        return False
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def counts(study: Path, cells: Sequence[Cell]) -> Counter[State]:
    """How many cells are in each state."""
    return Counter(state_of(study, cell) for cell in cells)


def seconds_left(study: Path, cells: Sequence[Cell], workers: int) -> float | None:
    """An estimate from the finished cells of each kind; None before the first of a kind that is left."""
    took: dict[str, list[float]] = {}
    left: Counter[str] = Counter()
    for cell in cells:
        file = cells_folder(study) / cell.id / DONE
        if file.is_file():
            with readable(file):
                took.setdefault(cell.kind, []).append(float(json.loads(file.read_bytes())["seconds"]))
        else:
            left[cell.kind] += 1
    if not set(left) <= set(took):
        return None
    return sum(statistics.mean(took[kind]) * number for kind, number in left.items()) / max(1, workers)


def version_of(study: Path, cell: Cell) -> str:
    """The version of the code that made a finished cell."""
    file, version = cells_folder(study) / cell.id / DONE, "unknown"
    with readable(file):
        version = str(json.loads(file.read_bytes()).get("code", version))
    return version


def last_step(study: Path, cell: Cell) -> int | None:
    """The optimiser step that a cell logged last, None before the first."""
    file = cells_folder(study) / cell.id / "metrics.csv"
    if not file.is_file():
        return None
    steps: list[int] = []
    with readable(file), file.open(newline="", errors="replace") as text:
        steps = [int(float(row["step"])) for row in csv.DictReader(text) if row.get("step")]
    return steps[-1] if steps else None


def failure(study: Path, cell: Cell) -> str:
    """Why a cell failed and where its log is."""
    file, said = cells_folder(study) / cell.id / FAILED, ""
    with readable(file):
        record = json.loads(file.read_bytes())
        said = f"{record['error'].splitlines()[-1] if record['error'] else 'no message'} (log: {record['log']})"
    return said


def summary(study: Path, cells: Sequence[Cell], workers: int = 1) -> str:
    """One line: how many cells are done, running, failed and left, and about how long it still takes."""
    number = counts(study, cells)
    parts = [f"{number[state]} {state}" for state in STATES if number[state] or state in ("done", "left")]
    rest = seconds_left(study, cells, workers)
    if rest is not None and number["done"] < len(cells):
        parts.append(f"about {_duration(rest)} to go")
    return f"{len(cells)} cells: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
