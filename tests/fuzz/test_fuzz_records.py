"""Whatever became of the files that a run wrote, they are read back or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import VALUES, damaged, fuzzed, mutated, outcome, randoms
from hypothesis import given
from hypothesis import strategies as st

from frpo.evaluation.records import read_frame, record_path
from frpo.foundation.errors import ConfigError
from frpo.foundation.redaction import redact_config
from frpo.models.checkpoint import build_policy, read_checkpoint
from frpo.run.completions import read_completions
from frpo.run.metrics_csv import MetricsCSV
from frpo.run.spool import SPOOL_NAME, Spool
from frpo.study.cells import Cell
from frpo.study.folder import DONE, FAILED, PLAN, cell_folder, failure, last_step, read_plan, summary, version_of

REFUSALS = (ConfigError, ValueError, OSError)
COMPLETION = {"stage": "train", "step": 1, "position": 0, "sample": 0, "text": "Red."}
EVALUATED = {
    "suite": "s", "step": 1, "prompt_id": "a", "task": "t", "sample": 0,
    "scores": {"q": {"value": 1.0, "status": "value"}}, "kl": {"base": {"sequence": 0.5, "token": None}},
}  # fmt: skip
CELL = {"id": "c-1", "address": "1", "kind": "policy", "method": "M", "family": "M", "seed": 0}
PLANNED = {"name": "study", "roles": {"baseline": "M"}, "cells": [CELL]}
DELIVERED = {"accepted": 0, "runs": {"key": "id"}}


def completions(folder: Path) -> object:
    return list(read_completions(folder))


def delivered(folder: Path) -> object:
    spool = Spool(folder / SPOOL_NAME)
    try:
        return len(spool)
    finally:
        spool.close()


def logged(folder: Path) -> object:
    logger = MetricsCSV(str(folder))
    logger.begin(resumed=True)
    logger.log_metrics({"loss": 1.0, "new": 2.0}, step=2)
    return True


def state(folder: Path) -> object:
    _, _, cells = read_plan(folder)
    known = [cell for cell in cells if isinstance(cell.id, str) and isinstance(cell.kind, str)] or [Cell(**CELL)]
    return [*(version_of(folder, Cell(**CELL)) for _ in known), failure(folder, Cell(**CELL)), summary(folder, known)]


def step(folder: Path) -> object:
    return last_step(folder, Cell(**CELL))


CELL_FOLDER = cell_folder(Path(), "c-1")
# File, its content as written, and what reads it.
FILES: list[tuple[Path, str, Callable[[Path], object]]] = [
    (Path("completions/part-00000-00000.jsonl"), (json.dumps(COMPLETION) + "\n") * 3, completions),
    (record_path("", "s", 1), (json.dumps(EVALUATED) + "\n") * 2, read_frame),
    (Path(SPOOL_NAME), (json.dumps({"kind": "metric", "run": "key"}) + "\n") * 2, delivered),
    (Path(SPOOL_NAME).with_suffix(".state.json"), json.dumps(DELIVERED), delivered),
    (Path("metrics.csv"), "step,loss,reward\n0,1.5,\n1,1.0,0.5\n", logged),
    (Path(PLAN), json.dumps(PLANNED), state),
    (CELL_FOLDER / DONE, json.dumps({"cell": "c-1", "seconds": 1.0, "code": "1"}), state),
    (CELL_FOLDER / FAILED, json.dumps({"error": "it broke", "log": "log.txt"}), state),
    (CELL_FOLDER / "metrics.csv", "step,loss\n1,2.0\n", step),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with every file as a run and a study write them."""
    for name, content, _ in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def read_back(folder: Path, index: int, data: bytes) -> None:
    name, content, read = FILES[index]
    for file in (Path(SPOOL_NAME), Path(SPOOL_NAME).with_suffix(".state.json"), Path("metrics.csv")):
        (folder / file).write_text(next(text for known, text, _ in FILES if known == file))  # reading moves these on
    (folder / name).write_bytes(data)
    try:
        outcome(lambda: read(folder), REFUSALS, name.stem.split(".")[0])
    finally:
        (folder / name).write_text(content)


@fuzzed(400)
@given(draw=randoms, index=st.integers(0, len(FILES) - 1))
def test_a_damaged_file_of_a_run_is_read_or_refused(run, draw, index):
    read_back(run, index, damaged(FILES[index][1].encode(), draw))


@fuzzed(300)
@given(draw=randoms, index=st.sampled_from([i for i, (name, *_) in enumerate(FILES) if name.suffix != ".csv"]))
def test_a_file_of_a_run_with_other_values_is_read_or_refused(run, draw, index):
    lines = [json.dumps(mutated(json.loads(line), draw)) for line in FILES[index][1].splitlines()]
    read_back(run, index, ("\n".join(lines) + "\n").encode())


@fuzzed(150)
@given(draw=randoms)
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path, draw):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"policy_model.w": torch.ones(4)}, "global_step": 3, "loops": {}}, path)
    path.write_bytes(damaged(path.read_bytes(), draw))
    outcome(lambda: read_checkpoint(path), REFUSALS, "last.ckpt")


@fuzzed(60)
@given(draw=randoms)
def test_any_description_of_a_policy_builds_one_or_is_refused(draw):
    description = {"class_path": "frpo.models.policy.Policy", "init_args": {"path": "x", "adapter": {"r": 4}}}
    values = tuple(value for value in VALUES if value != "\ud800")
    outcome(lambda: build_policy(mutated(description, draw, values)), ValueError, "")


@fuzzed(200)
@given(draw=randoms)
def test_any_text_of_a_configuration_is_redacted(draw):
    text = b"a: 1\nmodel: {api_key: sk-aaaaaaaaaaaaaaaaaaaa}\nb: [1, 2]\n"
    outcome(lambda: [redact_config(damaged(text, draw).decode(errors="replace"))], (), "")
