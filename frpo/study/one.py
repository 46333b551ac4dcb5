"""One cell, from its configuration to its results, in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from frpo.foundation.durable import write_whole
from frpo.foundation.errors import ConfigError
from frpo.foundation.redaction import redact_text
from frpo.study.cells import DONE, FAILED, LOG, POLICY_FOLDER, Cell, cells_folder, code_version, replaced
from frpo.study.spec import StudySpec, Tree
from frpo.study.spelling import spelled_out

LOCK = "lock"
BUSY = 75
"""Exit status of a cell's process that found another one at it."""
LOCK_SECONDS = 2.0
"""How long a lock is tried for: a look at the state of a cell holds it for a moment."""


def run_cell(spec: StudySpec, study: Path, cell: Cell, tracking: Tree | None) -> None:
    """Run ``cell`` of the study in the folder ``study``, or go on with it where a kill left it.

    A policy cell trains (or takes a model as it is), exports the policy to ``<cell>/policy`` and evaluates it on all
    suites; a downstream cell fine-tunes, and is evaluated on the way. ``done.json`` appears last.
    """
    started = time.time()
    folder = cells_folder(study) / cell.id
    names = _names(study, cell)
    if cell.kind == "downstream":
        _fit(cell, folder, names, _placed(cell, folder, spec.data_dir, tracking))
    else:
        if not (folder / POLICY_FOLDER).is_dir():
            if cell.layers:
                _fit(cell, folder, names, _placed(cell, folder, spec.data_dir, tracking))
            _export(cell, folder)
        placed = _placed(cell, folder, spec.data_dir, tracking, ", evaluated")
        _evaluate(cell, folder, replaced(_without_start(spec.suites), names), placed)
    if not spec.keep_checkpoints:
        for file in (folder / "checkpoints").glob("*.ckpt"):
            file.unlink()
    done = {"cell": cell.id, "seconds": round(time.time() - started, 1), "code": code_version()}
    write_whole(folder / DONE, json.dumps(done) + "\n")


def _names(study: Path, cell: Cell) -> dict[str, str]:
    """What ``${study.start}``, ``${study.reference}`` and ``${study.seed}`` stand for."""

    def policy(name: str | None) -> str:
        return str(cells_folder(study) / (name or cell.id) / POLICY_FOLDER)

    # The policy that a policy cell measures is itself; its reference is what it was trained from.
    reference = cell.parent if cell.kind == "policy" else cell.reference
    return {"start": policy(cell.parent), "reference": policy(reference), "seed": str(cell.seed)}


def _fit(cell: Cell, folder: Path, names: dict[str, str], placed: Tree) -> None:
    from frpo.cli.training import fit

    last = folder / "checkpoints" / "last.ckpt"
    own = ["--ckpt_path", "last"] if last.is_file() else ["--overwrite", "true"]
    # Kept for the run alone: what the run records of its configuration has no secrets in it.
    with tempfile.TemporaryDirectory() as scratch:
        words = written([*replaced(cell.layers, names), placed], Path(scratch)) + own
        devices = cell.merged().get("trainer", {}).get("devices", 1)
        # Several devices are processes that Lightning starts by the command line of this one.
        status = fit(words) if devices in (1, "1") else _in_process_of_its_own(["fit", *words])
    if status != 0:
        raise SystemExit(status)


def written(layers: list[Tree], folder: Path) -> list[str]:
    """Write configuration layers to ``folder``; returns the words of a command line that reads them."""
    words: list[str] = []
    for number, layer in enumerate(layers):
        file = folder / f"{number:02d}.yaml"
        file.write_text(yaml.safe_dump(spelled_out(layer), sort_keys=False), encoding="utf-8")
        words += ["--config", str(file)]
    return words


def _in_process_of_its_own(words: list[str]) -> int:
    process = subprocess.Popen([sys.executable, "-m", "frpo", *words])
    try:
        return process.wait()
    finally:  # terminated: so is the run
        if process.poll() is None:
            process.terminate()
            process.wait()


def _placed(cell: Cell, folder: Path, data_dir: str, tracking: Tree | None, after: str = "") -> Tree:
    """Name, folders and loggers of the run; these do not change what it computes."""
    loggers: list[Tree] = [{"class_path": "MetricsCSV", "output_dir": str(folder)}]
    if tracking is not None:
        tags = {**tracking.get("tags", {}), **_tags(cell)}
        settings = {**tracking, "tags": tags, "run_name": cell.title + after, "output_dir": str(folder)}
        loggers.append({"class_path": "MLflowTracker", **settings})
    return {"name": cell.id, "output_dir": str(folder), "data_dir": data_dir, "trainer": {"logger": loggers}}


def _tags(cell: Cell) -> dict[str, str]:
    factors = {**cell.factors, **cell.downstream}
    own = {"cell": cell.id, "kind": cell.kind, "method": cell.method, "seed": cell.seed, "task": cell.task}
    return {f"frpo.{name}": str(value) for name, value in {**own, **factors}.items() if value != ""}


def _export(cell: Cell, folder: Path) -> None:
    from frpo.models.checkpoint import build_policy, load_policy
    from frpo.models.export import export_policy

    if cell.layers:
        loaded = load_policy(folder / "checkpoints" / "last.ckpt", trust_remote_code=cell.trusts_remote_code)
        policy, model = loaded.policy, loaded.model
    else:
        policy = build_policy(spelled_out(cell.policy))
        policy.prepare()
        model = policy.load()
    export_policy(
        model,
        policy.tokenizer,
        folder / POLICY_FOLDER,
        merge=hasattr(model, "peft_config"),
        trust_remote_code=cell.trusts_remote_code,
    )


def _evaluate(cell: Cell, folder: Path, suites: Tree, placed: Tree) -> None:
    """Measure the policy in the arithmetic it was trained in."""
    from frpo.cli.evaluate import main

    merged = cell.merged()
    described = cell.policy or merged["model"]["policy"]
    kept = ("dtype", "attn_implementation", "trust_remote_code", "chat_template", "pad_token")
    settings = {name: value for name, value in described.items() if name in kept}
    policy = {"class_path": "Policy", **settings, "path": str(folder / POLICY_FOLDER)}
    trainer = {k: v for k, v in merged.get("trainer", {}).items() if k in ("accelerator", "precision")}
    tree = {
        "seed_everything": cell.seed,
        "model": {"policy": policy},
        "evaluation": {"suites": suites},
        "trainer": trainer,
    }
    with tempfile.TemporaryDirectory() as scratch:
        status = main(written([tree, placed], Path(scratch)))
    if status != 0:
        raise SystemExit(status)


def _without_start(suites: Tree) -> Tree:
    """A trained policy is where downstream runs start: its KL to the start is 0 and is not measured."""
    kept = {}
    for name, suite in suites.items():
        kl_to = {key: path for key, path in (suite.get("kl_to") or {}).items() if path != "${study.start}"}
        if kl_to or suite.get("scores"):
            kept[name] = {**suite, "kl_to": kl_to or None}
    return kept


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


def child(spec: StudySpec, study: str, cell: Cell, tracking: Tree | None, device: str | None) -> None:
    """The body of a cell's process: lock, log file, run; what goes wrong is kept in ``failed.json``.

    ``device`` is the one GPU it sees, None for whatever there is.
    """
    folder = cells_folder(Path(study)) / cell.id
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with locked(folder) as mine:
        if not mine:
            raise SystemExit(BUSY)
        if (folder / DONE).is_file():
            return
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        _set_threads(spec.threads)
        try:
            run_cell(spec, Path(study), cell, tracking)
        except Exception as error:  # written down for the status, then raised
            record_failure(folder, _told(error))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else "".join(traceback.format_exception_only(error))


def record_failure(folder: Path, reason: str) -> None:
    """Keep why a cell failed, and where its log is."""
    record: dict[str, Any] = {"error": redact_text(reason.strip()), "log": str(folder / LOG)}
    write_whole(folder / FAILED, json.dumps(record, indent=1) + "\n")
