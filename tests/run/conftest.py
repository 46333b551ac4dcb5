from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tracking_server import Server


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    """One server for all tests: importing it and making its tables take seconds."""
    server = Server(tmp_path_factory.mktemp("mlflow"))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.url)
    client.log_text(client.create_run(client.create_experiment("first requests are slow")).info.run_id, "", "file")
    yield server
    server.reset()
    server.stop()


@pytest.fixture
def server(_server):
    _server.reset()
    _server.start()
    yield _server
    _server.reset()


@pytest.fixture
def sqlite_uri(_server, tmp_path) -> str:
    """An empty MLflow database of this test's own, with its tables."""
    made = Path(_server.database.removeprefix("sqlite:///"))
    copy = tmp_path / "mlflow" / "mlflow.db"
    copy.parent.mkdir()
    shutil.copy(made, copy)
    return f"sqlite:///{copy}"
