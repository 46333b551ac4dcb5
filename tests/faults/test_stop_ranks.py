"""Two processes, of which one alone is told to stop: both do, after the same batch."""

from __future__ import annotations

import os
import signal

import fault_runs
import pytest


@pytest.mark.skipif("FRPO_TEST_KILLS" not in os.environ, reason="two minutes; FRPO_TEST_KILLS=20 runs it")
@pytest.mark.parametrize(("phase", "step", "saved"), [("rollout", 2, 3), ("rollout", 3, 4), ("validation", 4, 4)])
def test_both_stop_with_one_checkpoint_and_go_on_from_it(tmp_path, phase, step, saved):
    gloo = {"process_group_backend": "gloo"}
    ddp = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": gloo}
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    for place in (whole, folder):
        fault_runs.configure(place, devices=2, strategy=ddp)
    assert fault_runs.run(fault_runs.command, whole) == 0, (whole / "log.txt").read_text()[-3000:]
    plan = {"phase": phase, "step": step, "signal": "SIGTERM", "rank": 1}
    assert fault_runs.run(fault_runs.command, folder, plan) == 128 + signal.SIGTERM
    assert fault_runs.saved_step(folder) == saved
    assert fault_runs.run(fault_runs.command, folder) == 0, (folder / "log.txt").read_text()[-3000:]
    outcome = fault_runs.compared(folder, whole)
    assert all(outcome[same] for same in ("identical", "rows equal", "csv equal", "metrics equal")), outcome
