"""The MLflow logger of a run. No failure of the server ends, stalls or falsifies training."""

from __future__ import annotations

import logging
import re
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from frpo.foundation.durable import DiskError
from frpo.foundation.redaction import redact, redact_text
from frpo.run.courier import Courier, check_tracking_uri
from frpo.run.outbox import Outbox
from frpo.run.spool import SPOOL_NAME, Event, Spool

log = logging.getLogger(__name__)
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class MLflowTracker(Logger):
    """Logs to MLflow and keeps in ``<output_dir>/mlflow_spool.jsonl`` what the server did not take.

    A request that fails or hangs costs at most ``2 * timeout_s`` seconds; then the server is left alone for
    ``retry_every_s`` (doubling to ten minutes) while events wait on disk in order. They are delivered when it answers
    again, when the run ends, when a later run resumes, or by ``frpo track replay``. Secrets are replaced by ``***``
    before anything is written or sent.

    The run is opened at its first metric or at :meth:`begin`, not before: a resumed run learns its key only once the
    checkpoint is read. With ``rerun`` a metric whose step the run already holds is skipped, for MLflow can delete none
    and the steps since the checkpoint are logged twice; the value logged first stays.

    Args:
        output_dir: Folder of the run, where the spool lies.
        tracking_uri: ``sqlite:///file.db`` or the address of a server.
        experiment_name: Experiment to put the run in; created where missing.
        run_name: Name shown by MLflow, which invents one for None.
        tags: Further tags of the run.
        artifact_location: Where a new experiment keeps its files; None leaves it to the server, and puts it into
            ``mlartifacts/`` beside a SQLite file.
        timeout_s: Seconds to wait for a connection and for each read.
        retry_every_s: First pause before a silent server is asked again, in seconds.

    Raises:
        ValueError: a ``tracking_uri`` that MLflow cannot use, or a timeout below a second.
    """

    def __init__(
        self,
        output_dir: str,
        tracking_uri: str = "sqlite:///mlflow.db",
        experiment_name: str = "frpo",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        artifact_location: str | None = None,
        timeout_s: int = 5,
        retry_every_s: float = 30.0,
    ) -> None:
        super().__init__()
        check_tracking_uri(tracking_uri)
        if timeout_s < 1:
            raise ValueError(f"timeout_s: got {timeout_s}, expected at least 1 second; write timeout_s: 5")
        self._output_dir = Path(output_dir)
        self._uri, self._timeout, self._retry_every = tracking_uri, timeout_s, retry_every_s
        self._experiment_name, self._run_name = experiment_name, run_name
        self._tags, self._artifact_location = tags or {}, artifact_location
        self._key = uuid.uuid4().hex
        self._known_run_id: str | None = None
        self._rerun = self._opened = self._stopped = False
        self._early: list[Event] = []
        self._outbox: Outbox | None = None

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """The run's key, chosen here, the same after a resume."""
        return self._key

    @property
    def save_dir(self) -> str:
        """The run's output folder."""
        return str(self._output_dir)

    @property
    def run_key(self) -> str:
        """The run's key; MLflow holds it in the tag ``frpo.run_key``."""
        return self._key

    @property
    def run_id(self) -> str | None:
        """The server's id of the run, None until a server has answered."""
        return None if self._outbox is None else self._outbox.spool.run_id(self._key)

    @rank_zero_only
    def begin(self, run_key: str | None = None, run_id: str | None = None, rerun: bool = False) -> None:
        """Open the run, or continue the one that a checkpoint names; the first call counts.

        ``rerun`` says that steps since the checkpoint may be logged a second time.
        """
        if self._opened:
            return
        self._key, self._known_run_id = run_key or self._key, run_id
        self._rerun = rerun
        self._open()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars; characters that MLflow refuses in a name become ``_`` and ``@`` becomes ``_at_``."""
        if not metrics:
            return
        values = {metric_name(key): float(value) for key, value in metrics.items()}
        self._send({"op": "metrics", "metrics": values, "step": step or 0, "rerun": self._rerun})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log a nested mapping as parameters named by their path, without secrets."""
        tree = vars(params) if isinstance(params, Namespace) else dict(params)
        flat = {name: redact_text(text) for name, text in _flatten(redact(tree)).items()}
        if flat:
            self._send_early({"op": "params", "params": flat})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run, without secrets."""
        self._send_early({"op": "tags", "tags": {key: str(redact(str(v), key)) for key, v in tags.items()}})

    @rank_zero_only
    def log_text(self, text: str, file: str) -> None:
        """Store ``text`` as the artifact ``file``. Redact configuration with ``redact_config`` first."""
        self._send_early({"op": "text", "text": redact_text(text), "file": file})

    @rank_zero_only
    def log_artifact(self, path: Path, folder: str) -> None:
        """Store a local file as an artifact in ``folder``; its content is sent as it is when the server takes it."""
        self._send({"op": "artifact", "path": str(path.absolute()), "folder": folder})

    def stopped(self) -> None:
        """Have the run end as KILLED: someone asked it to stop, and nothing failed."""
        self._stopped = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run and try once more to deliver what waits; say how to deliver the rest."""
        if not self._opened and not self._early:
            return
        ended = "KILLED" if self._stopped else _STATUS.get(status, "FAILED")
        try:
            self._send({"op": "status", "status": ended}, last=True)
        except DiskError as error:
            if ended == "FINISHED":
                raise
            # A full disk ends runs, and what it said first is what the user is to read.
            log.warning("the end of the run is not recorded: %s", error)
            return
        assert self._outbox is not None
        spool = self._outbox.spool
        if spool:
            log.warning(
                "%d events have not reached MLflow and stay in %s; deliver them once the server is back with: "
                "frpo track replay %s --tracking-uri %s",
                *(len(spool), spool.path, spool.path, redact_text(self._uri)),
            )

    def _send_early(self, event: Event) -> None:
        """Parameters are logged before a checkpoint is read: hold them until the run is known."""
        if self._opened:
            self._send(event)
        else:
            self._early.append({**event, "time": _now()})

    def _send(self, event: Event, last: bool = False) -> None:
        if not self._opened:
            self._open()
        assert self._outbox is not None
        self._outbox.send({"time": _now(), **event, "run": self._key}, last)

    def _open(self) -> None:
        spool = Spool(self._output_dir / SPOOL_NAME)
        self._outbox = Outbox(spool, Courier(self._uri, spool, self._timeout), self._retry_every)
        self._opened = True
        self._send(
            {
                "op": "open",
                "run_id": self._known_run_id,
                "experiment": self._experiment_name,
                "artifact_location": self._artifact_location,
                "name": self._run_name,
                "tags": {key: str(redact(str(value), key)) for key, value in self._tags.items()},
            }
        )
        early, self._early = self._early, []
        for event in early:
            self._send(event)


def metric_name(name: str) -> str:
    """``name`` as MLflow takes it: letters, digits and ``_ - . / `` and space.

    Example: ``metric_name("pass@1")`` is ``"pass_at_1"``.
    """
    return re.sub(r"[^\w/. \-]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def _flatten(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, Mapping) and tree:
        parts = [_flatten(value, f"{path}/{key}" if path else str(key)) for key, value in tree.items()]
        return {name: text for part in parts for name, text in part.items()}
    return {metric_name(path): str(tree)}


def _now() -> int:
    return int(time.time() * 1000)
