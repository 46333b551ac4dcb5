"""Processes that start in an instant: forks of one server per test process, which has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

HELPERS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
"""As the tests were started with, and whatever they set since; the helpers can be imported."""
HANGS_S = 300
"""No process here takes a tenth of it on an idle core: one that takes longer hangs."""


def context() -> ForkServerContext:
    """The start method; :mod:`preloaded` is imported by the first call, in the server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    # The server is not told of sys.path, and leaves out in silence what it cannot import.
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        forkserver.ensure_running()
    return found


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Call it in a new process; the exit code."""
    process = context().Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join(HANGS_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{target.__name__} hung")
    return process.exitcode


class Command:
    """``python -m frpo WORDS`` in ``folder``, with a session of its own; what it prints goes to ``log``."""

    def __init__(self, *words: str, folder: Path, log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        self._process = context().Process(target=_command, args=(words, folder, log, environment or ENVIRONMENT))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal, None while it runs."""
        return self._process.exitcode

    @property
    def printed(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that it is to do."""
        limit = time.monotonic() + HANGS_S
        while not happened():
            assert self.status is None, self.printed
            assert time.monotonic() < limit, self.printed
            time.sleep(0.02)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        self._process.join(HANGS_S)
        if self.status is None:
            self.kill()
            raise AssertionError(f"the command hung: {self.printed}")
        return self.status

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and to the processes that it started."""
        if self.status is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join(HANGS_S)


def _command(words: tuple[str, ...], folder: Path, log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.argv = ["frpo", *words]
    from frpo.__main__ import main

    sys.exit(main(list(words)))
