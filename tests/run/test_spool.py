import json
import os
import subprocess
import sys

import pytest

from frpo.run.spool import Spool


def test_events_come_back_in_order_across_processes_and_leave_once_accepted(tmp_path):
    path = tmp_path / "run" / "mlflow_spool.jsonl"
    spool = Spool(path)
    for n in range(3):
        spool.append({"n": n})
    first = [(event["n"], mark) for event, mark in spool.waiting()]
    assert [n for n, _ in first] == [0, 1, 2]
    spool.accepted(first[0][1])
    spool.remember("key", "id")

    again = Spool(path)
    assert [event["n"] for event, _ in again.waiting()] == [1, 2]
    assert len(again) == 2
    assert again.run_id("key") == "id"
    again.accepted(first[2][1])
    assert not again
    assert path.stat().st_size == 0
    again.append({"n": 3})
    assert [event["n"] for event, _ in Spool(path).waiting()] == [3]


def test_a_torn_last_line_is_cut(tmp_path):
    path = tmp_path / "mlflow_spool.jsonl"
    path.write_text('{"n": 0}\n{"n": 1')
    spool = Spool(path)
    spool.append({"n": 2})
    assert [event["n"] for event, _ in spool.waiting()] == [0, 2]


def test_a_crash_between_the_two_steps_of_emptying_loses_nothing_later(tmp_path):
    path = tmp_path / "mlflow_spool.jsonl"
    spool = Spool(path)
    spool.append({"n": 0})
    spool.append({"n": 1})
    spool.accepted(next(spool.waiting())[1])
    os.truncate(path, 0)
    reopened = Spool(path)
    assert not reopened
    for n in range(5):
        reopened.append({"n": n})
    assert [event["n"] for event, _ in Spool(path).waiting()] == [0, 1, 2, 3, 4]


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "mlflow_spool.jsonl"
    spool = Spool(path)
    code = f"from pathlib import Path; from frpo.run.spool import Spool; Spool(Path({str(path)!r}))"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in refused.stderr
    assert "another output_dir" in refused.stderr
    spool.close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_refused_event_is_kept_with_its_reason(tmp_path):
    file = Spool(tmp_path / "mlflow_spool.jsonl").reject({"n": 0}, "why")
    assert json.loads(file.read_text()) == {"reason": "why", "event": {"n": 0}}


def test_a_disk_that_refuses_says_so(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "mlflow_spool.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("frpo.run.spool.os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*mlflow_spool.jsonl: No space left .*bytes free"):
        spool.append({"n": 0})
