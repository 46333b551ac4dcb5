"""Delivers events to one MLflow server, each within a deadline, and tells 'not now' from 'never'."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as DeadlinePassed
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from frpo.foundation.redaction import redact_text
from frpo.run.spool import Event, Spool

T = TypeVar("T")
RUN_KEY_TAG = "frpo.run_key"
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# Making a database's tables takes seconds on a slow disk; MLflow retries an unreachable one for 55 minutes.
_DATABASE_DEADLINE_SECONDS = 60.0
_UPLOAD_BYTES_PER_SECOND = 1e6
_METRICS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_LONGEST_PARAM = 6000
_FINAL_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "INVALID_STATE"})


class UnreachableError(Exception):
    """The server did not take the event now; a later attempt may succeed."""


class RejectedError(Exception):
    """The server understood the event and will never take it."""


class Courier:
    """Delivers events; knows runs by key, keeps their server ids in the spool's state.

    A request gets ``timeout_s`` to connect and as long for each read, no retries, and ``2 * timeout_s`` in all. The
    work runs in a thread of its own so that name resolution, a dripping reply or a driver's own retries cannot hold up
    the caller longer than that.
    """

    def __init__(self, tracking_uri: str, spool: Spool, timeout_s: int) -> None:
        self._uri, self._spool, self._timeout = tracking_uri, spool, timeout_s
        self._mlflow_client: Any = None
        self._stuck: Thread | None = None
        self._last_steps: dict[str, dict[str, int]] = {}
        self._operations: dict[str, Callable[[Event], None]] = {
            "open": self._open,
            "metrics": self._metrics,
            "params": self._params,
            "tags": self._tags,
            "text": self._text,
            "artifact": self._artifact,
            "status": self._status,
        }

    def deliver(self, event: Event) -> None:
        """Hand one event to the server.

        Raises:
            UnreachableError: no answer in time, or an answer that may change (refused login, overload, lost database).
            RejectedError: the server will never take it.
        """
        if event["op"] == "artifact" and not Path(event["path"]).is_file():
            raise RejectedError(f"the file {event['path']} is no longer there")
        client_errors = _import_mlflow()
        try:
            if self._mlflow_client is None:
                is_database = self._uri.startswith(_DATABASES)
                seconds = _DATABASE_DEADLINE_SECONDS if is_database else 2.0 * self._timeout
                self._mlflow_client = self._within(seconds, self._connect)
            self._within(self._seconds(event), lambda: self._operations[event["op"]](event))
        except (UnreachableError, RejectedError):
            raise
        except DeadlinePassed as error:
            raise UnreachableError("no answer in time") from error
        except client_errors as error:
            final = error.error_code in _FINAL_REFUSALS and event["op"] != "open"
            raise (RejectedError if final else UnreachableError)(_reason(error)) from error
        # Drivers and artifact stores raise errors of their own, and none may end a training run.
        except Exception as error:
            raise UnreachableError(_reason(error)) from error

    def _seconds(self, event: Event) -> float:
        size = Path(event["path"]).stat().st_size if event["op"] == "artifact" else 0
        return 2.0 * self._timeout + size / _UPLOAD_BYTES_PER_SECOND

    def _within(self, seconds: float, call: Callable[[], T]) -> T:
        if self._stuck is not None and self._stuck.is_alive():
            raise UnreachableError("an earlier request has not come back yet")
        outcome: Future[T] = Future()

        def work() -> None:
            try:
                with _impatient(self._timeout):
                    outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

        thread = Thread(target=work, name="mlflow-courier", daemon=True)
        thread.start()
        try:
            return outcome.result(seconds)
        finally:
            self._stuck = thread if not outcome.done() else None

    def _connect(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(self._uri)

    def _open(self, event: Event) -> None:
        """Find the run by id or key, else create it; note the last step it holds of each metric."""
        client, key = self._mlflow_client, event["run"]
        run = self._find(event)
        if run is None:
            run = client.create_run(
                self._experiment(event),
                start_time=event["time"],
                run_name=event["name"],
                tags={**event["tags"], RUN_KEY_TAG: key},
            )
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self._last_steps[key] = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._spool.remember(key, run.info.run_id)

    def _find(self, event: Event) -> Any:
        from mlflow.exceptions import MlflowException

        known = self._spool.run_id(event["run"]) or event["run_id"]
        if known is not None:
            try:
                run = self._mlflow_client.get_run(known)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        # An earlier request may have created the run and lost the answer.
        found = self._mlflow_client.search_runs(
            [self._experiment(event)], f"tags.`{RUN_KEY_TAG}` = '{event['run']}'", max_results=1
        )
        return found[0] if found else None

    def _experiment(self, event: Event) -> str:
        from mlflow.exceptions import MlflowException

        client, name = self._mlflow_client, event["experiment"]
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=self._artifact_location(event))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                # Another run of the same study created it in between.
                found = client.get_experiment_by_name(name)
        return found.experiment_id

    def _artifact_location(self, event: Event) -> str | None:
        """What was asked for; beside a SQLite file by default, where MLflow would use the working directory."""
        if event["artifact_location"] is not None or not self._uri.startswith("sqlite"):
            return event["artifact_location"]
        database = Path(self._uri.split(":///", 1)[1].split("?", 1)[0]).absolute()
        return str(database.parent / "mlartifacts" / re.sub(r"[^\w.\-]", "_", event["experiment"]))

    def _metrics(self, event: Event) -> None:
        from mlflow.entities import Metric

        last = self._steps_before(event["run"]) if event["rerun"] else {}
        metrics = [
            Metric(key, value, event["time"], event["step"])
            for key, value in event["metrics"].items()
            if event["step"] > last.get(key, -1)
        ]
        for start in range(0, len(metrics), _METRICS_PER_REQUEST):
            batch = metrics[start : start + _METRICS_PER_REQUEST]
            self._mlflow_client.log_batch(self._run_id(event), metrics=batch, synchronous=True)

    def _steps_before(self, run: str) -> dict[str, int]:
        if run not in self._last_steps:
            held = self._mlflow_client.get_run(self._run_id({"run": run}))
            self._last_steps[run] = {metric.key: metric.step for metric in held.data.to_proto().metrics}
        return self._last_steps[run]

    def _params(self, event: Event) -> None:
        """Parameters cannot change in MLflow: one that a resumed run changed becomes a tag ``param.<name>``."""
        from mlflow.entities import Param, RunTag

        run_id = self._run_id(event)
        held = self._mlflow_client.get_run(run_id).data.params
        given = {key: value[:_LONGEST_PARAM] for key, value in event["params"].items()}
        fresh = [Param(key, value) for key, value in given.items() if key not in held]
        changed = [RunTag(f"param.{k}", v) for k, v in given.items() if k in held and held[k] != v]
        for start in range(0, len(fresh), _PARAMS_PER_REQUEST):
            batch = fresh[start : start + _PARAMS_PER_REQUEST]
            self._mlflow_client.log_batch(run_id, params=batch, synchronous=True)
        for start in range(0, len(changed), _PARAMS_PER_REQUEST):
            tags = changed[start : start + _PARAMS_PER_REQUEST]
            self._mlflow_client.log_batch(run_id, tags=tags, synchronous=True)

    def _tags(self, event: Event) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in event["tags"].items()]
        self._mlflow_client.log_batch(self._run_id(event), tags=tags, synchronous=True)

    def _text(self, event: Event) -> None:
        self._mlflow_client.log_text(self._run_id(event), event["text"], event["file"])

    def _artifact(self, event: Event) -> None:
        self._mlflow_client.log_artifact(self._run_id(event), event["path"], event["folder"])

    def _status(self, event: Event) -> None:
        self._mlflow_client.set_terminated(self._run_id(event), event["status"], event["time"])

    def _run_id(self, event: Event) -> str:
        run_id = self._spool.run_id(event["run"])
        if run_id is None:
            raise RejectedError(f"no run with key {event['run']} was opened before this event")
        return run_id


def check_tracking_uri(uri: str) -> None:
    """Refuse an address MLflow cannot use.

    Raises:
        ValueError: no scheme, or one that MLflow 3 does not serve.
    """
    scheme = uri.split(":", 1)[0].split("+", 1)[0] if ":" in uri else ""
    if scheme not in _SCHEMES:
        raise ValueError(
            f"tracking_uri: got {redact_text(uri)!r}, expected an address that starts with one of {list(_SCHEMES)}: "
            "MLflow 3 no longer writes to plain folders; write tracking_uri: sqlite:///mlflow.db or "
            "http://host:5000"
        )


def _import_mlflow() -> type[Any]:
    """Import MLflow outside any deadline, without its usage reports; return the error its clients raise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.exceptions import MlflowException

    return MlflowException


@contextmanager
def _impatient(timeout_s: int) -> Iterator[None]:
    """MLflow reads its patience from the environment at every request: lend it ours for one."""
    ours = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    theirs = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in theirs.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reason(error: BaseException) -> str:
    return redact_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
