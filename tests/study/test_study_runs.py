"""A study runs to its report, whatever is killed on the way; every cell is a tracked run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from frpo.cli.report import load_results
from frpo.cli.study import run, status
from frpo.foundation.errors import ConfigError
from frpo.study.cells import expand
from frpo.study.folder import locked, read_plan, state_of
from frpo.study.reading import read_study
from frpo.study.runner import BUSY, Runner

POLICY = {"class_path": "frpo.tiny.policy.TinyPolicy", "init_args": {"steps": 2, "seed": "${study.seed}"}}
PROMPTS = {"class_path": "frpo.tiny.sources.TinySource", "init_args": {"split": "held_out", "limit": 4}}
ROUTER = {
    "class_path": "frpo.rewards.router.Router",
    "init_args": {
        "routes": {
            "risky": {"class_path": "frpo.tiny.rewards.TinyRisky"},
            "benign": {"class_path": "frpo.tiny.rewards.TinyBenign"},
        }
    },
}
SAMPLER = {"class_path": "frpo.rollouts.in_process.InProcessSampler", "init_args": {"max_new_tokens": 6}}
SUITE = {
    "class_path": "frpo.evaluation.suite.Suite",
    "init_args": {
        "prompts": PROMPTS,
        "scores": {"reward": ROUTER},
        "sampler": SAMPLER,
        "samples": 2,
        "kl_to": {"start": "${study.start}", "reference": "${study.reference}"},
    },
}
CONSTANT = {"class_path": "frpo.schedules.Constant", "init_args": {"value": 1.0}}
SHORT = {
    "trainer": {"max_steps": 2, "limit_val_batches": 0},
    "model": {"init_args": {"group_size": 2, "sampler": SAMPLER, "lr_schedule": CONSTANT}},
    "data": {"init_args": {"batch_size": 2}},
}
TUNING = {"trainer": {"max_steps": 2, "limit_val_batches": 0}, "data": {"init_args": {"batch_size": 4}}}


def study(**changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "seeds": [0],
        "methods": {
            "base": {"policy": POLICY, "compare": False},
            "GRPO": {
                "from": "base",
                "config": ["recipes/tiny/grpo.yaml"],
                "settings": SHORT,
                "factors": {"beta": 0.05},
            },
            "FRPO": {
                "from": "base",
                "config": ["recipes/tiny/frpo.yaml"],
                "settings": SHORT,
                "factors": {"beta": 0.05},
            },
        },
        "downstream": {
            "comply": {"config": ["recipes/tiny/downstream_comply.yaml"], "settings": TUNING},
            "rl": {"config": ["recipes/tiny/downstream_rl.yaml"], "settings": SHORT},
        },
        "evaluation": {"suites": {"both": SUITE}, "at_steps": [1, 2]},
        "report": {
            "baseline": "GRPO",
            "safety": "both/reward",
            "reward": "both/reward",
            "kl_reference": "both/kl/reference/sequence",
            "kl_start": "both/kl/start/sequence",
            "tasks": {"comply": "both/reward"},
        },
        **changes,
    }


def write(folder: Path, tree: dict[str, Any]) -> str:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a study ran without interruption, as its working folder."""
    folder = tmp_path_factory.mktemp("whole")
    tracking = {"tracking_uri": "sqlite:///mlflow.db", "experiment_name": "studies"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run([write(folder, study(tracking=tracking)), "--workers", "2"]) == 0
    finally:
        os.chdir(before)
    return folder


def table(folder: Path) -> pd.DataFrame:
    frame = load_results(folder / "outputs/studies/small").frame
    return frame.sort_values([*frame.columns]).reset_index(drop=True)


def test_a_study_measures_every_policy_before_and_after_fine_tuning(finished: Path):
    frame = table(finished)
    assert set(frame["method"]) == {"GRPO", "FRPO"}, "a stage that is not compared is left out"
    tuned = frame[frame["task"] == "comply"]
    assert set(frame["task"]) == {"", "comply", "rl"}, "supervised, and by reinforcement learning"
    assert set(tuned["step"]) == {1, 2}
    assert set(frame[frame["task"] == ""]["step"]) == {0}
    assert set(tuned["quantity"]) == {
        "reward",
        *(f"kl/{n}/{p}" for n in ("start", "reference") for p in ("sequence", "token")),
    }
    drift = tuned[tuned["quantity"] == "kl/start/sequence"].groupby("step")["value"].mean()
    assert 0 < drift[1] < drift[2]
    before = frame[(frame["task"] == "") & (frame["quantity"] == "kl/reference/sequence")]
    assert (before["value"] > 0).all()
    assert "kl/start/sequence" not in set(frame[frame["task"] == ""]["quantity"])
    assert not frame["prompt_id"].isna().any()


def test_a_study_ends_with_a_report(finished: Path):
    report = finished / "outputs/studies/small/report"
    page = (report / "report.html").read_text()
    assert "GRPO" in page
    assert "FRPO" in page
    assert json.loads((report / "summary.json").read_text())


def test_every_cell_is_a_run_under_the_study_and_the_report_is_with_it(finished: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished}/mlflow.db")
    experiment = client.get_experiment_by_name("studies")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.info.run_name == "small"]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parents[0].info.run_id}
    evaluated = {r.info.run_name for r in children if "eval/both/reward" in r.data.metrics}
    tuned = {f"{method}, seed 0 -> {task}" for method in ("GRPO", "FRPO") for task in ("comply", "rl")}
    assert evaluated == tuned | {f"{method}, seed 0, evaluated" for method in ("base", "GRPO", "FRPO")}
    assert {r.info.run_name for r in children} == evaluated | {"GRPO, seed 0", "FRPO, seed 0"}
    assert {r.info.status for r in runs} == {"FINISHED"}
    artifacts = {file.path for file in client.list_artifacts(parents[0].info.run_id, "report")}
    assert {"report/report.html", "report/tables.csv"} <= artifacts


def test_what_is_done_is_not_run_again(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(finished)
    assert run(["small.yaml", "--no_report"]) == 0
    out = capfd.readouterr().out
    assert "7 done" in out
    assert "started" not in out
    assert status(["outputs/studies/small"]) == 0
    assert "7 cells: 7 done, 0 left" in capfd.readouterr().out


@pytest.mark.parametrize("moment", ["started  GRPO", "started  FRPO, seed 0 -> comply"])
def test_a_killed_study_goes_on_and_ends_with_the_same_table(finished: Path, tmp_path: Path, moment: str):
    file = write(tmp_path, study())
    (tmp_path / ".cache").symlink_to(finished / ".cache")
    command = [sys.executable, "-m", "frpo", "study", "run", file, "--workers", "1", "--no_report"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = tmp_path / "outputs/studies/small"
    _, _, cells = read_plan(folder)
    assert any(state_of(folder, cell) != "done" for cell in cells), "killed too late to show anything"
    assert subprocess.run(command, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    pd.testing.assert_frame_equal(table(tmp_path), table(finished))


def test_two_calls_at_once_share_the_work(finished: Path, tmp_path: Path):
    file = write(tmp_path, study())
    (tmp_path / ".cache").symlink_to(finished / ".cache")
    command = [sys.executable, "-m", "frpo", "study", "run", file, "--workers", "1", "--no_report"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "failed" not in "".join(said)
    logs = [file.read_text() for file in (tmp_path / "outputs/studies/small/cells").glob("*/log.txt")]
    assert len(logs) == 7
    assert all(text.count("training from step") <= 1 for text in logs), "a cell ran twice"
    pd.testing.assert_frame_equal(table(tmp_path), table(finished))


def test_a_cell_that_fails_leaves_the_others_and_says_why(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache").symlink_to(finished / ".cache")
    tree = study()
    tree["methods"]["FRPO"]["settings"] = {**SHORT, "data": {"init_args": {"batch_size": 2, "max_prompt_length": 1}}}
    assert run([write(tmp_path, tree), "--no_report"]) == 1
    out = capfd.readouterr().out
    assert "failed   FRPO, seed 0: " in out
    assert "max_prompt_length" in out
    assert "finished GRPO, seed 0 -> comply" in out
    assert status(["outputs/studies/small"]) == 0
    assert "failed: FRPO, seed 0" in capfd.readouterr().out
    results = load_results(tmp_path / "outputs/studies/small")
    assert set(results.missing) == {
        "FRPO, seed 0 (failed)",
        "FRPO, seed 0 -> comply",
        "FRPO, seed 0 -> rl",
    }


def test_a_cell_whose_process_is_killed_is_told_of(tmp_path: Path):
    cells = expand(read_study(write(tmp_path, study())))
    told: list[str] = []
    runner = Runner(tmp_path / "s", cells, 1, print, (), told.append)
    (tmp_path / "s/cells" / cells[0].id).mkdir(parents=True)
    runner.slots[cells[0].id] = 0
    runner._ended(cells[0], -9)
    assert "its process was killed by signal 9" in told[0]
    assert state_of(tmp_path / "s", cells[0]) == "failed"


def test_a_cell_lost_to_another_call_is_taken_up_again(tmp_path: Path):
    cells = expand(read_study(write(tmp_path, study())))
    runner = Runner(tmp_path / "s", cells, 1, print, (), lambda line: None)
    runner.tried.add(cells[0].id)
    runner.slots[cells[0].id] = 0
    runner._ended(cells[0], BUSY)
    assert cells[0].id not in runner.tried
    assert state_of(tmp_path / "s", cells[0]) == "left"


def test_what_training_evaluated_on_the_way_is_no_measurement_of_the_policy(finished: Path, tmp_path: Path):
    copy = tmp_path / "outputs/studies/small"
    shutil.copytree(finished / "outputs/studies/small", copy)
    _, _, cells = read_plan(copy)
    for cell in cells:
        folder = copy / "cells" / cell.id / "evaluation/both"
        if cell.kind == "policy":
            (folder / "step=000002.jsonl").write_text(
                (folder / "step=000000.jsonl").read_text().replace('"step": 0', '"step": 2')
            )
    pd.testing.assert_frame_equal(table(tmp_path), table(finished))


def test_a_key_of_a_grid_that_no_run_has_is_refused_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tree = study()
    tree["downstream"]["comply"]["grid"] = {"lr": {"key": "model.init_args.optimiser.init_args.lr", "values": [1.0]}}
    with pytest.raises(ConfigError, match=r"comply, lr 1.0: its run cannot be configured:\s.*optimiser.*optimizer"):
        run([write(tmp_path, tree)])
    assert not any((tmp_path / "outputs/studies/small/cells").glob("*/done.json"))


def test_a_cell_that_another_call_runs_is_left_to_it(tmp_path: Path):
    cells = expand(read_study(write(tmp_path, study())))
    base = cells[0]
    with locked(tmp_path / "s/cells" / base.id) as mine:
        assert mine
        assert state_of(tmp_path / "s", base) == "running"
        runner = Runner(tmp_path / "s", cells, 1, print, (), lambda line: None)
        assert runner._advance(None), "it waits"
        assert not runner.running
    assert state_of(tmp_path / "s", base) == "left"
