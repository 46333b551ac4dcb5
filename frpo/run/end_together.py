"""One rank of several fails: all end within seconds, and each says which rank failed first, and why."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from frpo.foundation import require
from frpo.foundation.redaction import redact_text

POLL_S = 0.5
READ_S = 10.0
"""What a rank that failed gives the others to read so, at most: its process may hold the store."""
GRACE_S = 3.0
"""Between the news and the end of a rank that waits for others: time for the failing one to say more itself."""
TEARDOWN_S = 30.0
"""What a rank that raised has for its loggers, its callbacks and the process group."""
_LONGEST = 2000
_DONE = b"done"


class EndTogether(Callback):
    """Ends every rank within seconds where one fails, instead of at the timeout of the backend.

    A rank that raises says so in the key-value store of the process group, where a thread of each rank looks twice a
    second. The others print the first failing rank and its error (without secrets), close their loggers as failed,
    and end with status 1, whatever they wait for. A rank that is killed says nothing: the others notice at the latest
    ``patience_s`` after its last sign of life. Neither a run that is complete nor SIGTERM is a failure.

    The command line adds it to every run of several ranks. In Python give it to the Trainer as the first callback;
    call :meth:`start` before ``fit`` to cover what comes before the callbacks' ``setup``, such as ``prepare_data``.

    Not covered: a rank that fails before the ranks have met (``init_process_group``).

    Args:
        patience_s: Seconds without a sign of life after which a rank counts as killed. A rank gives none while a
            library holds Python's interpreter lock.

    Raises:
        ValueError: ``patience_s`` of 5 or less.
    """

    def __init__(self, patience_s: float = 60.0) -> None:
        self.patience_s = require.number("EndTogether.patience_s", patience_s, above=5, finite=False)
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread: a strategy may copy callbacks to new processes."""
        return {**self.__dict__, "_watch": None}

    def start(self, trainer: Trainer) -> None:
        """Watch from now on, or from when the ranks have met."""
        if self._watch is None or not self._watch.is_alive():
            self._watch = Watch(self.patience_s, lambda: _close_loggers(trainer))
            self._watch.start()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch where there are several ranks."""
        if trainer.world_size > 1:
            self.start(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run is complete here."""
        if self._watch is not None:
            self._watch.leave(done=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others, before anything else here can wait for them."""
        if self._watch is None:
            return
        if isinstance(exception, SIGTERMException):
            self._watch.leave()
        else:
            self._watch.report(exception)


class Watch(threading.Thread):
    """Gives a sign of life, looks for failures of others, and ends the process.

    Each rank listens to the one before it. ``close`` is called before the end of a process that did not fail itself.
    """

    def __init__(self, patience_s: float, close: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="end-together")
        self.patience_s, self.close = patience_s, close
        self._over, self._connecting = threading.Event(), threading.Lock()
        self._connection: Any = None
        self._raised: BaseException | None = None
        self._beats, self._heard, self._heard_at = 0, b"", 0.0
        # A thread that is in the store's code when the interpreter goes would crash the process.
        atexit.register(self.leave)

    def run(self) -> None:
        """Until the run is over or a rank has failed."""
        while not dist.is_initialized():
            if self._over.wait(POLL_S):
                return
        rank, ranks, store = dist.get_rank(), dist.get_world_size(), self._store()
        failure = None
        while failure is None:
            if self._over.wait(POLL_S):
                return
            try:
                failure = self._exchange(store, rank, ranks)
            except dist.DistError:  # the process that holds the store is gone: it is at its end, or was killed
                if self._over.wait(self.patience_s):
                    return
                failure = f"rank 0 of {ranks} is gone, and the store of the process group with it"
        self._end(failure, rank)

    def report(self, exception: BaseException) -> None:
        """Publish an exception of this rank, unless another failed before, and wait until the others have read it."""
        self._raised = exception
        if not dist.is_initialized():
            return
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = f"rank {rank} of {ranks} failed: {type(exception).__name__}: {redact_text(str(exception))}"[:_LONGEST]
        try:
            first = self._store().compare_set("failure", "", own).decode()
            if first == own:
                self._wait_for([f"seen/{other}" for other in range(ranks) if other != rank])
            else:
                exception.add_note(f"Before this, {first}")
                self._acknowledge(rank)  # this process may be gone before its thread looks again
        except dist.DistError:
            exception.add_note(f"Rank 0 of {ranks} was gone by then.")

    def leave(self, done: bool = False) -> None:
        """Stop watching; ``done`` tells the others that no sign of life is to be expected."""
        atexit.unregister(self.leave)
        self._over.set()
        if not self.is_alive() or threading.current_thread() is self:
            return
        self.join(POLL_S * 4)
        if done and dist.is_initialized():
            try:
                self._store().set(f"beat/{dist.get_rank()}", _DONE)
            except dist.DistError:
                return  # the store went with a rank that was complete before

    def _exchange(self, store: Any, rank: int, ranks: int) -> str | None:
        """Give and take signs of life; the first failure, if there is one."""
        self._beats += 1
        store.set(f"beat/{rank}", str(self._beats))
        if store.check(["failure"]):
            return str(store.get("failure").decode())
        before = (rank - 1) % ranks
        if not store.check([f"beat/{before}"]):
            return None
        beat, now = store.get(f"beat/{before}"), time.monotonic()
        if beat != self._heard or beat == _DONE:
            self._heard, self._heard_at = beat, now
        if now - self._heard_at < self.patience_s:
            return None
        silent = f"rank {before} of {ranks} gave no sign of life for {self.patience_s:g} s: it was killed or is stuck"
        return str(store.compare_set("failure", "", silent).decode())

    def _end(self, failure: str, rank: int) -> None:
        if self._raised is None:
            print(f"frpo: rank {rank} ends: {failure}", file=sys.stderr, flush=True)
        self._acknowledge(rank)
        if self._over.wait(GRACE_S):
            return
        if self._raised is None:
            closing = threading.Thread(target=self.close, daemon=True)
            closing.start()
            closing.join(TEARDOWN_S)
        else:
            if self._over.wait(TEARDOWN_S):
                return
            traceback.print_exception(self._raised)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the main thread may wait for the others in code that no exception reaches

    def _acknowledge(self, rank: int) -> None:
        try:
            self._store().set(f"seen/{rank}", "")
        except dist.DistError:
            return  # the failing rank held the store, and is gone: nobody waits for this

    def _wait_for(self, keys: list[str]) -> None:
        """The store may go with this process: let the others read it, those that still can."""
        until = time.monotonic() + READ_S
        while time.monotonic() < until and not self._store().check(keys):
            time.sleep(POLL_S / 5)

    def _store(self) -> Any:
        """A connection of its own, made once: a wait of another thread blocks that of the process group.

        To connect again where the store is gone would wait for the backend's timeout.
        """
        with self._connecting:
            if self._connection is None:
                store: Any = dist.distributed_c10d._get_default_store()
                self._connection = dist.PrefixStore("frpo/end_together", store.clone())
        return self._connection


def _close_loggers(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        logger.finalize("failed")
