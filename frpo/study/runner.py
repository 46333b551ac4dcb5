"""Running the cells of a study side by side, each in a process of its own, a policy before what starts from it."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import frpo
from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError
from frpo.study.cells import Cell
from frpo.study.folder import (
    DONE,
    FAILED,
    LOG,
    cell_folder,
    failure,
    is_done,
    last_step,
    locked,
    record_failure,
    state_of,
    summary,
)

BUSY = 75
"""Exit status of a cell's process that found another one at it."""
POLL_SECONDS = 0.2
REPORT_SECONDS = 30.0
GRACE_SECONDS = 60.0
ELSEWHERE_SECONDS = 5.0


@dataclass
class Runner:
    """Runs ``cells`` in the folder ``study`` with at most ``workers`` processes.

    A cell that is done is skipped, one that another process runs is waited for, one that failed in an earlier call is
    tried again. A cell that dies does not stop the others; those that start from it are left.

    Args:
        study: the folder of the study.
        cells: policies, and what starts from them.
        workers: processes at once.
        body: runs one cell, or goes on with it where a kill left it. A function of a module, or a partial of one, as
            it is sent to other processes.
        preload: modules that every process has from its start.
        say: takes each line of progress.
    """

    study: Path
    cells: Sequence[Cell]
    workers: int
    body: Callable[[Cell], None]
    preload: Sequence[str]
    say: Callable[[str], None]
    running: dict[str, BaseProcess] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    elsewhere: dict[str, float] = field(default_factory=dict)

    def run(self) -> int:
        """Run what is left; returns the number of cells that are not done."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(self.preload))
        self.say(self._summary())
        reported = time.monotonic()
        previous = signal.signal(signal.SIGTERM, _terminated)
        try:
            while self._advance(context):
                time.sleep(POLL_SECONDS)
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    self.say(self._progress())
        finally:
            signal.signal(signal.SIGTERM, previous)
            self._stop()
        self.say(self._summary())
        return sum(not is_done(self.study, cell) for cell in self.cells)

    @cached_property
    def _by_id(self) -> dict[str, Cell]:
        return {cell.id: cell for cell in self.cells}

    def _advance(self, context: Any) -> bool:
        """Collect what ended, start what can be; False where nothing runs and nothing can be started."""
        for name, process in list(self.running.items()):
            if process.exitcode is not None:
                del self.running[name]
                self._ended(self._by_id[name], process.exitcode)
        waiting = False
        for cell in sorted(self.cells, key=lambda cell: cell.kind != "policy"):
            if len(self.running) >= self.workers:
                break
            if cell.id in self.tried or is_done(self.study, cell):
                continue
            if cell.parent is not None and not is_done(self.study, self._by_id[cell.parent]):
                waiting = waiting or cell.parent not in self.tried
            elif self._is_elsewhere(cell):
                waiting = True
            else:
                self._start(context, cell)
        return bool(self.running) or waiting

    def _is_elsewhere(self, cell: Cell) -> bool:
        """Whether a process of another call is at the cell; asked every few seconds only."""
        if time.monotonic() < self.elsewhere.get(cell.id, 0.0):
            return True
        if state_of(self.study, cell) != "running":
            return False
        self.elsewhere[cell.id] = time.monotonic() + ELSEWHERE_SECONDS
        return True

    def _start(self, context: Any, cell: Cell) -> None:
        self.tried.add(cell.id)
        folder = cell_folder(self.study, cell.id)
        (folder / FAILED).unlink(missing_ok=True)
        used = set(self.slots.values())
        self.slots[cell.id] = slot = next(slot for slot in itertools.count() if slot not in used)
        process = context.Process(target=child, args=(self.body, folder, cell, device_of(slot, self.workers)))
        process.start()
        self.running[cell.id] = process
        self.say(f"started  {cell.title}")

    def _ended(self, cell: Cell, status: int) -> None:
        del self.slots[cell.id]
        folder = cell_folder(self.study, cell.id)
        if is_done(self.study, cell):
            done = sum(is_done(self.study, other) for other in self.cells)
            self.say(f"finished {cell.title}  [{done}/{len(self.cells)}]")
        elif status == BUSY:  # another call was quicker; wait for it
            self.tried.discard(cell.id)
        else:
            if not (folder / FAILED).is_file():
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                record_failure(folder, f"its process {how}")
            self.say(f"failed   {cell.title}: {failure(self.study, cell)}")

    def _stop(self) -> None:
        """End what still runs; each cell goes on from its last checkpoint next time."""
        for process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()

    def _summary(self) -> str:
        return summary(self.study, self.cells, self.workers)

    def _progress(self) -> str:
        now = []
        for name in self.running:
            step = last_step(self.study, self._by_id[name])
            now.append(self._by_id[name].title + ("" if step is None else f" at step {step}"))
        return "; ".join([self._summary(), *now])


def child(body: Callable[[Cell], None], folder: Path, cell: Cell, device: str | None) -> None:
    """The process of a cell: lock, log file, ``body``; then ``done.json``, or ``failed.json`` with what went wrong.

    ``device`` is the one GPU it sees, None for whatever there is.
    """
    signal.signal(signal.SIGTERM, _terminated)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with locked(folder) as mine:
        if not mine:
            raise SystemExit(BUSY)
        if (folder / DONE).is_file():
            return
        started = time.time()
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            body(cell)
            done = {"cell": cell.id, "seconds": round(time.time() - started, 1), "code": code_version()}
            write_whole(folder / DONE, json.dumps(done) + "\n")
        except Exception as error:  # written down for the status, then raised
            is_told = isinstance(error, ConfigError)
            record_failure(folder, str(error) if is_told else "".join(traceback.format_exception_only(error)))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def code_version() -> str:
    """The version of frpo and a hash of its sources: results of different ones may differ, and the report says so."""
    root = Path(frpo.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"{frpo.__version__}+{digest.hexdigest()[:8]}"


def default_workers(threads: int) -> int:
    """As many cells at once as there are GPUs, or without one as the processor has cores for."""
    return len(gpus()) or max(1, len(os.sched_getaffinity(0)) // max(1, threads))


def device_of(slot: int, workers: int) -> str | None:
    """The GPU of a place in a study that runs several cells at once; None where a cell may see them all."""
    found = gpus()
    return found[slot % len(found)] if found and workers > 1 else None


def gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    return [str(i) for i in range(number)] if named is None else named.split(",")[:number]


def _terminated(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)
