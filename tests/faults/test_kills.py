"""A run of the command that is killed or told to stop, and resumed, leaves what an uninterrupted one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_runs
import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "fault_runs.py"
KILLS = int(os.environ.get("FRPO_TEST_KILLS", "3"))
SECONDS_A_KILL = 120


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> list[dict[str, Any]]:
    """What became of each run. FRPO_TEST_KILLS=20 has every phase of a run and moments of the clock."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("faults")), str(KILLS), "1"],
        env=fault_runs.environment(None),
        capture_output=True,
        text=True,
        timeout=SECONDS_A_KILL * (KILLS + 4),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check_same(outcome: dict[str, Any]) -> None:
    """Weights, optimiser, schedules and place bit by bit; no row or metric lost or doubled; all in one order."""
    assert outcome["identical"], outcome
    for kind in ("rows", "csv", "metrics"):
        assert outcome[kind] == [0, 0], outcome
        assert outcome[f"{kind} equal"], outcome
    assert outcome["status"] == "FINISHED", outcome


def test_killed_at_random_moments_and_resumed_nothing_is_lost_doubled_or_different(table):
    killed = [outcome for outcome in table if "signal" not in outcome]
    assert len(killed) == KILLS
    for outcome in killed:
        check_same(outcome)
        assert -signal.SIGKILL in outcome["died of"]


def test_asked_to_stop_it_saves_the_step_in_hand_and_repeats_nothing(table):
    stopped = [outcome for outcome in table if "signal" in outcome]
    assert stopped
    for outcome in stopped:
        check_same(outcome)
        assert outcome["died of"] == [128 + signal.Signals[outcome["signal"]]]
        validating = outcome["phase"] == "validation"
        assert outcome["resumed from"] == [outcome["step"] + (not validating)]
        assert outcome["left as"] == [["KILLED"]]


@pytest.fixture
def training(tmp_path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """The command in a process of its own, with a batch that takes ten seconds under way."""
    fault_runs.configure(tmp_path / "run")
    plan = {"phase": "slow reward", "step": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "frpo", *fault_runs.words(tmp_path / "run")],
        cwd=tmp_path / "run",
        env=fault_runs.environment(plan),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + SECONDS_A_KILL
    while not (tmp_path / "run" / "waiting").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


def test_a_second_ctrl_c_stops_at_once_in_two_lines(training):
    process, folder = training
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told
    assert "SIGINT: stopping after the batch in hand" in told
    assert told.rstrip().endswith(
        "frpo fit: stopped by SIGINT after step 1; no checkpoint was written yet; start again without --ckpt_path"
    )
    assert list(fault_runs.mlflow_runs(folder).values()) == ["KILLED"]
