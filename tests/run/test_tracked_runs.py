"""Whole Trainer runs against MLflow: recorded, resumed, and with the server dying under them."""

from __future__ import annotations

import json
import time
import uuid
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from mlflow.tracking import MlflowClient
from tracking_toy import ToyModule

from frpo.run import Checkpoint, CompletionTable, MetricsCSV, MLflowTracker, RunRecord, latest

CONFIG = "seed: 1\nreward:\n  api_key: planted\n"


def trainer(folder: Path, uri: str, experiment: str, *callbacks: Callback, **settings) -> Trainer:
    settings.setdefault("max_epochs", 2)
    return Trainer(
        callbacks=[
            RunRecord(str(folder), CONFIG),
            CompletionTable(str(folder), 3),
            Checkpoint(str(folder), 2),
            *callbacks,
        ],
        logger=[
            MLflowTracker(str(folder), uri, experiment, timeout_s=3, retry_every_s=60.0),
            MetricsCSV(str(folder)),
        ],
        log_every_n_steps=1,
        val_check_interval=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


def only_run(uri: str, experiment: str):
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def steps(uri: str, run_id: str, key: str) -> list[int]:
    return sorted(metric.step for metric in MlflowClient(uri).get_metric_history(run_id, key))


def artifacts(uri: str, run_id: str, folder: str | None = None) -> list[str]:
    return sorted(file.path for file in MlflowClient(uri).list_artifacts(run_id, folder))


class Fail(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("planted failure")


def test_a_run_that_fails_and_resumes_is_one_run_with_every_row_once(sqlite_uri, tmp_path):
    experiment = uuid.uuid4().hex
    with pytest.raises(RuntimeError, match="planted"):
        trainer(tmp_path, sqlite_uri, experiment, Fail(5)).fit(ToyModule(batches=4))
    first = only_run(sqlite_uri, experiment)
    assert first.info.status == "FAILED"
    again = trainer(tmp_path, sqlite_uri, experiment)
    module = ToyModule(batches=4)
    # The checkpoint is of step 4, and step 5 was logged after it.
    again.fit(module, ckpt_path=latest(tmp_path))
    again.test(module, verbose=False)

    run = only_run(sqlite_uri, experiment)
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    assert steps(sqlite_uri, run.info.run_id, "train/reward") == list(range(8))
    assert steps(sqlite_uri, run.info.run_id, "val/reward") == [1, 3, 5, 7]
    assert "test/reward" in run.data.metrics
    assert run.data.tags["strategy"] == "SingleDeviceStrategy"
    folder = tmp_path / "mlflow" / "mlartifacts" / experiment / run.info.run_id / "artifacts"
    assert yaml.safe_load((folder / "config.yaml").read_text())["reward"] == {"api_key": "***"}
    assert json.loads((folder / "resumed-4" / "environment.json").read_text())["world_size"] == 1
    for part in (tmp_path / "completions").glob("part-*.jsonl"):
        assert (folder / "completions" / part.name).read_bytes() == part.read_bytes()
    assert len(list((folder / "completions").iterdir())) == 5
    planted = [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
    assert planted == []


def test_a_test_in_a_process_of_its_own_goes_into_the_run_of_its_checkpoint(sqlite_uri, tmp_path):
    experiment = uuid.uuid4().hex
    trainer(tmp_path, sqlite_uri, experiment, max_steps=2).fit(ToyModule(batches=4))
    trainer(tmp_path, sqlite_uri, experiment).test(ToyModule(), ckpt_path=latest(tmp_path), verbose=False)
    run = only_run(sqlite_uri, experiment)
    assert run.info.status == "FINISHED"
    assert {"train/reward", "test/reward"} <= set(run.data.metrics)


def test_each_part_is_stored_once(sqlite_uri, tmp_path, monkeypatch):
    stored: list[str] = []
    log_artifact = MLflowTracker.log_artifact

    def counted(self, path, folder):
        stored.append(path.name)
        log_artifact(self, path, folder)

    monkeypatch.setattr(MLflowTracker, "log_artifact", counted)
    trainer(tmp_path, sqlite_uri, "parts").fit(ToyModule(batches=4))
    assert stored == [f"part-00000-0000{n}.jsonl" for n in range(3)]


def test_a_server_that_dies_under_a_run_does_not_stop_or_hold_it(server, tmp_path):
    experiment = uuid.uuid4().hex

    class Die(Callback):
        seconds = 0.0

        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                server.stop()
                self.seconds = time.monotonic()

        def on_train_end(self, trainer, *_):
            self.seconds = time.monotonic() - self.seconds

    die = Die()
    trainer(tmp_path, server.url, experiment, die).fit(ToyModule(batches=4))
    assert die.seconds < 4
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 13
    waiting = [json.loads(line) for line in (tmp_path / "mlflow_spool.jsonl").read_text().splitlines()]
    assert [event["step"] for event in waiting if "train/reward" in event.get("metrics", {})] == [3, 4, 5, 6, 7]

    server.start()
    module = ToyModule(batches=4)
    trainer(tmp_path, server.url, experiment).test(module, ckpt_path=latest(tmp_path), verbose=False)
    run = only_run(server.url, experiment)
    assert steps(server.url, run.info.run_id, "train/reward") == list(range(8))
    assert len(artifacts(server.url, run.info.run_id, "completions")) == 4
    assert (tmp_path / "mlflow_spool.jsonl").stat().st_size == 0


def test_the_shipped_fragment_builds_these_loggers(tmp_path, monkeypatch):
    from jsonargparse import ArgumentParser

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fragment = Path(__file__).parents[2] / "conf" / "logger" / "local.yaml"
    logger = {"trainer": {"logger": yaml.safe_load(fragment.read_text())["trainer"]["logger"]}}
    parser = ArgumentParser(parser_mode="omegaconf+")
    for name in ("output_dir", "name"):
        parser.add_argument(f"--{name}", type=str)
    parser.add_class_arguments(Trainer, "trainer")
    values = parser.parse_object({"output_dir": str(tmp_path), "name": "own", **logger})
    loggers = parser.instantiate(values).trainer.loggers
    assert [type(logger) for logger in loggers] == [MetricsCSV, MLflowTracker]
    assert {logger.save_dir for logger in loggers} == {str(tmp_path)}
    assert list(tmp_path.iterdir()) == []


def test_an_outage_in_the_middle_of_a_run_loses_and_doubles_nothing_and_holds_nothing_up(server, tmp_path):
    """The server is killed, its port refuses; then it hangs; then it is back while the run goes on."""
    experiment = uuid.uuid4().hex
    batches = 12

    class Outage(Callback):
        starts: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, *_):
            self.starts.append(time.monotonic())
            if trainer.global_step == 3:
                server.stop()
            if trainer.global_step == 8:
                server.mode = "lose"  # does the work, never answers
                server.start()
            if trainer.global_step == 12:
                server.reset()
            time.sleep(0.05)

    outage = Outage()
    fit = trainer(tmp_path, server.url, experiment, outage, max_epochs=2)
    tracker = fit.loggers[0]
    tracker._timeout, tracker._retry_every = 1, 0.3
    fit.fit(ToyModule(batches=batches))

    run = only_run(server.url, experiment)
    assert run.info.status == "FINISHED"
    assert (tmp_path / "mlflow_spool.jsonl").stat().st_size == 0
    history = MlflowClient(server.url).get_metric_history(run.info.run_id, "train/reward")
    assert [metric.step for metric in sorted(history, key=lambda metric: metric.step)] == list(range(2 * batches))
    assert len(steps(server.url, run.info.run_id, "val/reward")) == batches
    # One request that is not answered costs twice the timeout, then the server is left alone for a while.
    assert max(after - before for before, after in pairwise(outage.starts)) < 4
