"""A cell of a study: its configuration checked before anything runs, and its run from the start to the results."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import yaml

from frpo.cli.evaluate import main as evaluate
from frpo.cli.parsing import FrpoCLI
from frpo.cli.training import fit
from frpo.foundation.errors import ConfigError
from frpo.models.checkpoint import build_policy, load_policy
from frpo.models.export import export_policy
from frpo.study.cells import Cell, replaced
from frpo.study.folder import POLICY, cell_folder
from frpo.study.spec import StudySpec, Tree
from frpo.study.spelling import spelled_out

PRELOAD = ("frpo.cli.cell", "frpo.modules.supervised")
"""What the process of a cell has from its start."""


def run_cell(spec: StudySpec, study: Path, tracking: Tree | None, cell: Cell) -> None:
    """Run ``cell`` of the study in the folder ``study``, or go on with it where a kill left it.

    A policy cell trains (or takes a model as it is), exports the policy to ``<cell>/policy`` and evaluates it on all
    suites; a downstream cell fine-tunes, and is evaluated on the way. ``tracking`` are the settings of its MLflow runs.
    """
    torch.set_num_threads(spec.threads)
    folder, names = cell_folder(study, cell.id), _names(study, cell)
    placed = partial(_placed, cell, folder, spec.data_dir, tracking)
    exported = (folder / POLICY).is_dir()
    if cell.layers and not exported:
        _fit(cell, folder, [*replaced(cell.layers, names), placed(cell.title)])
    if cell.kind == "policy":
        if not exported:
            _export(cell, folder)
        suites = replaced(_without_start(spec.suites), names)
        _evaluate([_evaluation(cell, folder, suites), placed(f"{cell.title}, evaluated")])
    if not spec.keep_checkpoints:
        for file in (folder / "checkpoints").glob("*.ckpt"):
            file.unlink()


def check_runs(cells: Sequence[Cell], study: Path) -> None:
    """Build, without loading anything, the run of one cell of each method and each downstream task.

    Raises:
        ConfigError: a recipe, a setting or a key of a grid is wrong; the message names the cell.
    """
    chosen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.layers:
            chosen.setdefault((cell.kind, cell.task or cell.method), cell)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for cell in chosen.values():
        _check(cell, study)


def _check(cell: Cell, study: Path) -> None:
    quiet = {"name": cell.id, "output_dir": str(study / "check"), "trainer": {"logger": False}}
    # One process on the processor: what the run asks for may be another machine's.
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    with tempfile.TemporaryDirectory() as scratch:
        words = _written([*replaced(cell.layers, _names(study, cell)), quiet], Path(scratch))
        try:
            # What it warns of is in the log of the run that does it.
            with contextlib.redirect_stderr(io.StringIO()):
                FrpoCLI("fit", [*words, *here])
        except ConfigError as error:
            text = str(error).replace(f"{scratch}/", "layer ")
            raise ConfigError(f"{cell.title}: its run cannot be configured:\n{text}") from error


def _written(layers: list[Tree], folder: Path) -> list[str]:
    """Write configuration layers to ``folder``; returns the words of a command line that reads them."""
    words: list[str] = []
    for number, layer in enumerate(layers):
        file = folder / f"{number:02d}.yaml"
        file.write_text(yaml.safe_dump(spelled_out(layer), sort_keys=False), encoding="utf-8")
        words += ["--config", str(file)]
    return words


def _names(study: Path, cell: Cell) -> dict[str, str]:
    """What ``${study.start}``, ``${study.reference}`` and ``${study.seed}`` stand for."""

    def policy(cell_id: str | None) -> str:
        return str(cell_folder(study, cell_id or cell.id) / POLICY)

    # The policy that a policy cell measures is itself; its reference is what it was trained from.
    reference = cell.parent if cell.kind == "policy" else cell.reference
    return {"start": policy(cell.parent), "reference": policy(reference), "seed": str(cell.seed)}


def _placed(cell: Cell, folder: Path, data_dir: str, tracking: Tree | None, run_name: str) -> Tree:
    """Name, folders and loggers of a run; these do not change what it computes."""
    loggers: list[Tree] = [{"class_path": "MetricsCSV", "output_dir": str(folder)}]
    if tracking is not None:
        tags = {**tracking.get("tags", {}), **_tags(cell)}
        settings = {**tracking, "tags": tags, "run_name": run_name, "output_dir": str(folder)}
        loggers.append({"class_path": "MLflowTracker", **settings})
    return {"name": cell.id, "output_dir": str(folder), "data_dir": data_dir, "trainer": {"logger": loggers}}


def _tags(cell: Cell) -> dict[str, str]:
    factors = {**cell.factors, **cell.downstream}
    own = {"cell": cell.id, "kind": cell.kind, "method": cell.method, "seed": cell.seed, "task": cell.task}
    return {f"frpo.{name}": str(value) for name, value in {**own, **factors}.items() if value != ""}


def _fit(cell: Cell, folder: Path, layers: list[Tree]) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    own = ["--ckpt_path", "last"] if last.is_file() else ["--overwrite", "true"]
    # Kept for the run alone: what the run records of its configuration has no secrets in it.
    with tempfile.TemporaryDirectory() as scratch:
        words = _written(layers, Path(scratch)) + own
        devices = cell.merged().get("trainer", {}).get("devices", 1)
        # Several devices are processes that Lightning starts by the command line of this one.
        status = fit(words) if devices in (1, "1") else _in_process_of_its_own(["fit", *words])
    if status != 0:
        raise SystemExit(status)


def _in_process_of_its_own(words: list[str]) -> int:
    process = subprocess.Popen([sys.executable, "-m", "frpo", *words])
    try:
        return process.wait()
    finally:  # terminated: so is the run
        if process.poll() is None:
            process.terminate()
            process.wait()


def _export(cell: Cell, folder: Path) -> None:
    trust = bool(cell.described_policy().get("trust_remote_code", False))
    if cell.layers:
        loaded = load_policy(folder / "checkpoints" / "last.ckpt", trust_remote_code=trust)
        policy, model = loaded.policy, loaded.model
    else:
        policy = build_policy(spelled_out(cell.policy))
        policy.prepare()
        model = policy.load()
    merge = hasattr(model, "peft_config")
    export_policy(model, policy.tokenizer, folder / POLICY, merge=merge, trust_remote_code=trust)


def _evaluation(cell: Cell, folder: Path, suites: Tree) -> Tree:
    """The configuration that measures the policy, in the arithmetic it was trained in."""
    kept = ("dtype", "attn_implementation", "trust_remote_code", "chat_template", "pad_token")
    settings = {name: value for name, value in cell.described_policy().items() if name in kept}
    policy = {"class_path": "Policy", **settings, "path": str(folder / POLICY)}
    trainer = cell.merged().get("trainer", {})
    return {
        "seed_everything": cell.seed,
        "model": {"policy": policy},
        "evaluation": {"suites": suites},
        "trainer": {name: value for name, value in trainer.items() if name in ("accelerator", "precision")},
    }


def _evaluate(layers: list[Tree]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        evaluate(_written(layers, Path(scratch)))


def _without_start(suites: Tree) -> Tree:
    """A trained policy is where downstream runs start: its KL to the start is 0 and is not measured."""
    kept = {}
    for name, suite in suites.items():
        kl_to = {key: path for key, path in (suite.get("kl_to") or {}).items() if path != "${study.start}"}
        if kl_to or suite.get("scores"):
            kept[name] = {**suite, "kl_to": kl_to or None}
    return kept
