"""The folder of a study, from which any process can tell how far it is.

plan.json
cells/<id>/     the run of a cell: policy/, checkpoints/, metrics.csv, log.txt, lock, and done.json or failed.json
report/
"""

from __future__ import annotations

import csv
import fcntl
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError
from frpo.foundation.redaction import redact_text
from frpo.study.cells import Cell
from frpo.study.spec import StudySpec

PLAN, REPORT = "plan.json", "report"
POLICY, DONE, FAILED, LOG, LOCK = "policy", "done.json", "failed.json", "log.txt", "lock"
CONFIGURATION = ("policy", "layers")
"""What of a cell the plan leaves out: its run records its configuration, without secrets."""
LOCK_SECONDS = 2.0
"""How long a lock is tried for: a look at the state of a cell holds it for a moment."""
State = Literal["done", "running", "failed", "left"]
STATES: tuple[State, ...] = ("done", "running", "failed", "left")


def write_plan(study: Path, spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Keep what the cells of the study are: what its folder holds can be read without its YAML."""
    kept = [{key: value for key, value in asdict(cell).items() if key not in CONFIGURATION} for cell in cells]
    plan = {"name": spec.name, "roles": dict(spec.roles), "cells": kept}
    write_whole(study / PLAN, json.dumps(plan, indent=1, default=str) + "\n")


def read_plan(study: Path) -> tuple[str, dict[str, Any], list[Cell]]:
    """Name, roles for the report, and cells of the study in a folder.

    Raises:
        ConfigError: the folder holds no study, or a damaged one.
    """
    file = study / PLAN
    if not file.is_file():
        raise ConfigError(
            f"{study}: no study is here (no {PLAN}); give the output folder of `frpo study run`, which by default is "
            "outputs/studies/NAME"
        )
    with Readable(file):
        plan = json.loads(file.read_bytes())
        return str(plan["name"]), dict(plan["roles"]), [_cell(cell) for cell in plan["cells"]]


def _cell(kept: dict[str, Any]) -> Cell:
    cell = Cell(**kept)
    for name in ("id", "kind", "method", "family", "task"):
        if not isinstance(getattr(cell, name), str):
            raise TypeError(f"the {name} of a cell must be text")
    if not re.fullmatch(r"[\w.-]{1,200}", cell.id) or cell.id.startswith("."):
        raise ValueError(f"the cell {cell.id!r:.60} names no folder")
    return cell


class Readable(AbstractContextManager[None]):
    """Within, a damaged file of the study is a :class:`ConfigError` that names it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        damage = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)
        if isinstance(error, damage):
            raise ConfigError(
                f"{self.file} is damaged ({type(error).__name__}: {error}); it was changed after `frpo study run` "
                "wrote it: remove it and run the study again"
            ) from error


def cell_folder(study: Path, cell_id: str) -> Path:
    """Where the run of a cell lies."""
    return study / "cells" / cell_id


def is_done(study: Path, cell: Cell) -> bool:
    """Whether a cell has all its results."""
    return (cell_folder(study, cell.id) / DONE).is_file()


def state_of(study: Path, cell: Cell) -> State:
    """Whether a cell is done, running in some process, failed, or left to do."""
    folder = cell_folder(study, cell.id)
    if is_done(study, cell):
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


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a cell; gives False where another process holds it. A killed process lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with (folder / LOCK).open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.05)
        yield True


def record_failure(folder: Path, reason: str) -> None:
    """Keep why a cell failed, and where its log is."""
    record = {"error": redact_text(reason.strip()), "log": str(folder / LOG)}
    write_whole(folder / FAILED, json.dumps(record, indent=1) + "\n")


def failure(study: Path, cell: Cell) -> str:
    """Why a cell failed and where its log is."""
    file = cell_folder(study, cell.id) / FAILED
    with Readable(file):
        record = json.loads(file.read_bytes())
        return f"{record['error'].splitlines()[-1] if record['error'] else 'no message'} (log: {record['log']})"


def version_of(study: Path, cell: Cell) -> str:
    """The version of the code that made a finished cell."""
    file = cell_folder(study, cell.id) / DONE
    with Readable(file):
        return str(json.loads(file.read_bytes()).get("code", "unknown"))


def last_step(study: Path, cell: Cell) -> int | None:
    """The optimiser step that a cell logged last, None before the first."""
    file = cell_folder(study, cell.id) / "metrics.csv"
    if not file.is_file():
        return None
    with Readable(file), file.open(newline="", errors="replace") as text:
        steps = [int(float(row["step"])) for row in csv.DictReader(text) if row.get("step")]
        return steps[-1] if steps else None


def seconds_left(study: Path, cells: Sequence[Cell], workers: int) -> float | None:
    """An estimate from the finished cells of each kind; None before the first of a kind that is left."""
    took: dict[str, list[float]] = {}
    left: Counter[str] = Counter()
    for cell in cells:
        file = cell_folder(study, cell.id) / DONE
        if file.is_file():
            with Readable(file):
                took.setdefault(cell.kind, []).append(float(json.loads(file.read_bytes())["seconds"]))
        else:
            left[cell.kind] += 1
    if not set(left) <= set(took):
        return None
    return sum(statistics.mean(took[kind]) * number for kind, number in left.items()) / max(1, workers)


def summary(study: Path, cells: Sequence[Cell], workers: int = 1) -> str:
    """One line: how many cells are done, running, failed and left, and about how long it still takes."""
    number = Counter(state_of(study, cell) for cell in cells)
    parts = [f"{number[state]} {state}" for state in STATES if number[state] or state in ("done", "left")]
    rest = seconds_left(study, cells, workers)
    if rest is not None and number["done"] < len(cells):
        parts.append(f"about {_duration(rest)} to go")
    return f"{len(cells)} cells: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
