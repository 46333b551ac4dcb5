from __future__ import annotations

import logging
import math
import time
import uuid
from pathlib import Path

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from mlflow.tracking import MlflowClient

from frpo.cli.track import replay, replay_command
from frpo.run.tracker import MLflowTracker, metric_name


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def tracker(folder: Path, uri: str, retry_every_s: float = 0.0, **settings) -> MLflowTracker:
    settings.setdefault("experiment_name", uuid.uuid4().hex)
    settings.setdefault("timeout_s", 4)
    return MLflowTracker(str(folder), uri, retry_every_s=retry_every_s, **settings)


def runs(uri: str, experiment: str):
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else client.search_runs([found.experiment_id])


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, key))


def spool(folder: Path) -> Path:
    return folder / "mlflow_spool.jsonl"


def test_everything_is_recorded_in_sqlite(sqlite_uri, tmp_path):
    log = tracker(tmp_path, sqlite_uri, run_name="name", tags={"a": "b"})
    assert not spool(tmp_path).parent.joinpath("mlflow_spool.lock").exists()
    log.log_hyperparams({"model": {"lr": 0.1, "list": [1, 2]}, "empty": {}})
    log.log_metrics({"train/reward": 0.5, "pass@1": math.inf, "nan": math.nan}, step=3)
    log.log_text("text", "config.yaml")
    (tmp_path / "part.jsonl").write_text("{}\n")
    log.log_artifact(tmp_path / "part.jsonl", "completions")
    log.log_tags({"late": "tag"})
    log.finalize("success")
    (run,) = runs(sqlite_uri, log.name)
    assert run.info.run_id == log.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "name")
    assert run.data.params == {"model/lr": "0.1", "model/list": "[1, 2]", "empty": "{}"}
    assert history(sqlite_uri, log.run_id, "train/reward") == [(3, 0.5)]
    assert {"pass_at_1", "nan"} <= set(run.data.metrics)
    assert run.data.tags["a"] == "b"
    assert run.data.tags["late"] == "tag"
    artifacts = tmp_path / "mlflow" / "mlartifacts" / log.name / log.run_id / "artifacts"
    assert (artifacts / "config.yaml").read_text() == "text"
    assert (artifacts / "completions" / "part.jsonl").read_text() == "{}\n"
    assert not spool(tmp_path).exists()


def test_metric_names():
    assert metric_name("val/reward/a b-c.d_1") == "val/reward/a b-c.d_1"
    assert metric_name("pass@10 (é)") == "pass_at_10 ___"


def test_a_server_that_is_down_from_the_start_gets_everything_when_it_comes(server, tmp_path, caplog):
    server.stop()
    log = tracker(tmp_path, server.url)
    log.log_hyperparams({"lr": 0.1})
    for step in range(5):
        log.log_metrics({"m": step / 2}, step)
    assert log.run_id is None
    assert [r.levelname for r in caplog.records if "does not answer" in r.message] == ["WARNING"]
    server.start()
    log.log_metrics({"m": 2.5}, 5)
    log.finalize("success")
    (run,) = runs(server.url, log.name)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert history(server.url, run.info.run_id, "m") == [(step, step / 2) for step in range(6)]
    assert sum("answers again" in r.message for r in caplog.records) == 1
    assert spool(tmp_path).stat().st_size == 0


@pytest.mark.parametrize("mode", ["hang", "refuse", "lose"])
def test_a_server_that_fails_mid_run_costs_little_and_loses_or_doubles_nothing(server, tmp_path, mode):
    log = tracker(tmp_path, server.url, retry_every_s=60.0, timeout_s=2)
    log.log_metrics({"m": 0.0}, 0)
    server.mode = mode
    started = time.monotonic()
    log.log_metrics({"m": 1.0}, 1)
    incident = time.monotonic() - started
    assert incident < 4.5
    for step in range(2, 30):
        log.log_metrics({"m": float(step)}, step)
    assert time.monotonic() - started < incident + 1.5
    server.reset()
    log.finalize("success")
    (run,) = runs(server.url, log.name)
    assert run.info.status == "FINISHED"
    assert history(server.url, run.info.run_id, "m") == [(step, float(step)) for step in range(30)]


def test_a_run_whose_creation_was_not_answered_exists_once(server, tmp_path):
    log = tracker(tmp_path, server.url, retry_every_s=60.0, timeout_s=2)
    # get experiment, create it, search the run, then the creation itself.
    server.mode, server.after = "lose", 3
    log.log_metrics({"m": 1.0}, 0)
    server.reset()
    log.finalize("success")
    (run,) = runs(server.url, log.name)
    assert history(server.url, run.info.run_id, "m") == [(0, 1.0)]


def test_what_is_left_at_the_end_is_replayed_by_command_in_bits(server, tmp_path, caplog, capsys):
    server.stop()
    log = tracker(tmp_path, server.url)
    (tmp_path / "part.jsonl").write_text("{}\n")
    for step in range(4):
        log.log_metrics({"m": float(step)}, step)
    log.log_artifact(tmp_path / "part.jsonl", "completions")
    log.log_artifact(tmp_path / "absent.jsonl", "completions")
    log.finalize("failed")
    last = caplog.records[-1].message
    assert "frpo track replay" in last
    assert str(spool(tmp_path)) in last
    waiting = len(spool(tmp_path).read_text().splitlines())
    assert waiting == 8
    assert replay_command([str(tmp_path), "--tracking-uri", server.url]) == 1
    assert f"still waiting {waiting}" in capsys.readouterr().out

    server.start()
    server.mode, server.after = "refuse", 6
    some = replay(spool(tmp_path), server.url)
    assert 0 < some.delivered < waiting
    assert some.waiting == waiting - some.delivered
    server.reset()
    server.start()
    assert replay_command([str(spool(tmp_path)), "--tracking-uri", server.url]) == 0
    assert "refused 1, still waiting 0" in capsys.readouterr().out
    assert "absent.jsonl" in (tmp_path / "mlflow_spool.rejected.jsonl").read_text()
    (run,) = runs(server.url, log.name)
    assert run.info.status == "FAILED"
    assert history(server.url, run.info.run_id, "m") == [(step, float(step)) for step in range(4)]
    assert [f.path for f in MlflowClient(server.url).list_artifacts(run.info.run_id, "completions")] == [
        "completions/part.jsonl"
    ]
    assert replay_command([str(tmp_path), "--tracking-uri", server.url]) == 0


def test_events_that_a_crash_delivers_twice_count_once(server, tmp_path):
    server.stop()
    log = tracker(tmp_path, server.url)
    for step in range(3):
        log.log_metrics({"m": float(step)}, step)
    waiting = spool(tmp_path).read_bytes()
    server.start()
    assert replay(spool(tmp_path), server.url).delivered == 4
    # The process died before it noted that anything was accepted, the run's id included.
    spool(tmp_path).write_bytes(waiting)
    (tmp_path / "mlflow_spool.state.json").unlink()
    assert replay(spool(tmp_path), server.url).delivered == 4
    (run,) = runs(server.url, log.name)
    assert history(server.url, run.info.run_id, "m") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_replay_says_what_is_wrong(tmp_path, capsys):
    assert replay_command([str(tmp_path / "no"), "--tracking-uri", "http://localhost:1"]) == 2
    assert "no spool at" in capsys.readouterr().err
    spool(tmp_path).write_text("")
    assert replay_command([str(tmp_path), "--tracking-uri", "mlruns"]) == 2
    assert "sqlite:///mlflow.db" in capsys.readouterr().err


def test_a_resumed_run_goes_on_in_the_same_run_and_doubles_no_step(sqlite_uri, tmp_path):
    killed = tracker(tmp_path, sqlite_uri)
    for step in range(6):
        killed.log_metrics({"m": float(step)}, step)
    killed.finalize("failed")
    resumed = tracker(tmp_path, sqlite_uri, experiment_name=killed.name)
    resumed.log_hyperparams({"lr": 0.1})
    resumed.begin(killed.run_key, killed.run_id, rerun=True)
    for step in range(4, 9):
        resumed.log_metrics({"m": step + 0.25}, step)
        resumed.log_metrics({"new": 0.0}, step)
    (run,) = runs(sqlite_uri, killed.name)
    assert run.info.status == "RUNNING"
    resumed.finalize("success")
    assert resumed.run_id == killed.run_id == run.info.run_id
    assert history(sqlite_uri, run.info.run_id, "m") == [(s, s if s < 6 else s + 0.25) for s in range(9)]
    assert len(history(sqlite_uri, run.info.run_id, "new")) == 5
    (run,) = runs(sqlite_uri, killed.name)
    assert run.info.status == "FINISHED"


def test_a_run_killed_while_the_server_was_away_is_resumed_by_its_key(server, tmp_path):
    server.stop()
    killed = tracker(tmp_path, server.url, retry_every_s=60.0)
    for step in range(4):
        killed.log_metrics({"m": float(step)}, step)
    server.start()
    resumed = tracker(tmp_path, server.url, experiment_name=killed.name)
    resumed.begin(killed.run_key, None, rerun=True)
    for step in range(2, 6):
        resumed.log_metrics({"m": step + 0.25}, step)
    resumed.finalize("success")
    (run,) = runs(server.url, killed.name)
    assert history(server.url, run.info.run_id, "m") == [(s, s if s < 4 else s + 0.25) for s in range(6)]


def test_a_deleted_run_is_replaced_on_resume(sqlite_uri, tmp_path):
    first = tracker(tmp_path, sqlite_uri)
    first.log_metrics({"m": 0.0}, 0)
    MlflowClient(sqlite_uri).delete_run(first.run_id)
    resumed = tracker(tmp_path / "other", sqlite_uri, experiment_name=first.name)
    resumed.begin(first.run_key, first.run_id, rerun=True)
    resumed.log_metrics({"m": 1.0}, 1)
    assert resumed.run_id != first.run_id
    assert history(sqlite_uri, resumed.run_id, "m") == [(1, 1.0)]


def test_a_parameter_that_changed_on_resume_becomes_a_tag(sqlite_uri, tmp_path):
    first = tracker(tmp_path, sqlite_uri)
    first.log_hyperparams({"lr": 0.1, "steps": 10})
    first.log_metrics({"m": 0.0}, 0)
    first.log_hyperparams({"lr": 0.1, "steps": 20, "new": 1})
    (run,) = runs(sqlite_uri, first.name)
    assert run.data.params == {"lr": "0.1", "steps": "10", "new": "1"}
    assert run.data.tags["param.steps"] == "20"
    assert "param.lr" not in run.data.tags


def test_a_name_that_never_resolves_does_not_hold_up_the_run(tmp_path, monkeypatch):
    def never(*_, **__):
        time.sleep(8)
        raise OSError("no such host")

    monkeypatch.setattr("socket.getaddrinfo", never)
    log = tracker(tmp_path, "http://tracking.invalid:5000", timeout_s=1)
    started = time.monotonic()
    log.log_metrics({"m": 0.0}, 0)
    log.log_metrics({"m": 1.0}, 1)
    log.finalize("success")
    assert time.monotonic() - started < 4
    assert len(spool(tmp_path).read_text().splitlines()) == 4


def test_a_database_that_never_opens_does_not_hold_up_the_run(tmp_path, monkeypatch):
    # MLflow itself tries an unreachable database for 55 minutes.
    monkeypatch.setattr("frpo.run.courier._DATABASE_DEADLINE_SECONDS", 0.5)
    monkeypatch.setattr("frpo.run.courier.Courier._connect", lambda self: time.sleep(5))
    log = tracker(tmp_path, f"sqlite:///{tmp_path}/never.db")
    started = time.monotonic()
    log.log_metrics({"m": 0.0}, 0)
    log.finalize("success")
    assert time.monotonic() - started < 2
    assert len(spool(tmp_path).read_text().splitlines()) == 3


def test_the_pause_doubles_while_the_server_stays_away(server, tmp_path):
    server.mode = "refuse"
    log = tracker(tmp_path, server.url, retry_every_s=0.2)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        log.log_metrics({"m": 0.0}, 0)
        time.sleep(0.02)
    assert 3 <= server.requests <= 5


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "/abs/mlruns", "foo://x"])
def test_an_address_that_mlflow_cannot_use_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match=r"tracking_uri: got .* write tracking_uri: sqlite:///mlflow.db"):
        MLflowTracker(str(tmp_path), uri)


def test_a_refused_address_does_not_show_its_password(tmp_path):
    with pytest.raises(ValueError, match="tracking_uri") as refused:
        MLflowTracker(str(tmp_path), "ftp://ann:planted@host")
    assert "planted" not in str(refused.value)


def test_a_timeout_below_a_second_is_refused(tmp_path):
    with pytest.raises(ValueError, match="timeout_s: got 0"):
        MLflowTracker(str(tmp_path), timeout_s=0)


def test_secrets_reach_neither_database_nor_files_nor_messages(sqlite_uri, server, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="frpo")
    monkeypatch.setenv("JUDGE_API_KEY", "planted-by-environment")
    secrets = {"api_key": "planted-1", "url": "http://ann:planted-2@host/v1", "note": "planted-by-environment"}
    server.stop()
    away = server.url.replace("http://", "http://ann:planted-3@")
    for uri, folder in ((sqlite_uri, tmp_path / "a"), (away, tmp_path / "b")):
        log = tracker(folder, uri, tags={"hub_token": "planted-4", "where": secrets["url"]})
        log.log_hyperparams({"reward": {"init_args": secrets}})
        log.log_tags(secrets)
        log.log_text(f"see {secrets['url']} {secrets['note']}", "notes.txt")
        log.log_metrics({"m": 0.0}, 0)
        log.finalize("success")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert [str(path) for path in written if b"planted" in path.read_bytes()] == []
    assert spool(tmp_path / "b").stat().st_size > 0
    assert "planted" not in caplog.text
