"""A real MLflow server in this process, on a port of its own, that can hang, refuse, lose answers, die and return."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Server:
    """``mode`` is up, refuse (503), hang, or lose (does the work, never answers); ``after`` requests it takes over."""

    def __init__(self, folder: Path) -> None:
        self.database = f"sqlite:///{folder}/server.db"
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = self.database
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = "mlflow-artifacts:/"
        os.environ["_MLFLOW_SERVER_SERVE_ARTIFACTS"] = "true"
        os.environ["_MLFLOW_SERVER_ARTIFACT_DESTINATION"] = str(folder / "artifacts")
        from mlflow.server import app

        self._app = app
        self._http: Any = None
        self._port = 0
        self._waiting = threading.Event()
        self.reset()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def reset(self) -> None:
        self._waiting.set()
        self.mode, self.after, self.requests = "up", 0, 0
        self._waiting = threading.Event()

    def start(self) -> None:
        if self._http is None:
            self._http = make_server("127.0.0.1", self._port, self, threaded=True, request_handler=_Quiet)
            self._port = self._http.server_port
            threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.requests += 1
        mode = self.mode if self.requests > self.after else "up"
        if mode == "lose":
            b"".join(self._app(environ, lambda *_: None))
        if mode in ("hang", "lose"):
            self._waiting.wait(20)
        if mode != "up":
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start_response)
