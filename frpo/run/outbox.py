"""Keeps events in order between a run that must not wait and a server that may not answer."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from frpo.run.courier import Courier, RejectedError, UnreachableError
from frpo.run.spool import Event, Spool

log = logging.getLogger(__name__)
_LONGEST_PAUSE_SECONDS = 600.0
_DRAIN_SECONDS = 5.0
_LAST_DRAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Counts:
    """What became of waiting events: taken by the server, refused for good, still waiting."""

    delivered: int = 0
    rejected: int = 0
    waiting: int = 0


class Outbox:
    """Delivers events in order; while the server is away they wait in the spool.

    After a failure the server is left alone for ``retry_every_s`` seconds, doubling to ten minutes while it stays away,
    so that a dead server costs one deadline per pause. Events behind waiting ones wait too. One warning says that the
    server is away, one that it is back.
    """

    def __init__(self, spool: Spool, courier: Courier, retry_every_s: float) -> None:
        self.spool, self._courier = spool, courier
        self._first_pause = self._pause = retry_every_s
        self._retry_at = 0.0
        self._away = False

    def send(self, event: Event, last: bool = False) -> None:
        """Deliver ``event`` now, or behind those that wait; the last event of a run does not sit out a pause."""
        if self.spool:
            self.spool.append(event)
            if last or time.monotonic() >= self._retry_at:
                self.drain(_LAST_DRAIN_SECONDS if last else _DRAIN_SECONDS)
            return
        try:
            self._deliver(event)
        except UnreachableError as error:
            self.spool.append(event)
            self._server_away(error)

    def drain(self, seconds: float = float("inf")) -> Counts:
        """Deliver what waits, in order, stopping at the first failure or once ``seconds`` have passed."""
        delivered = rejected = 0
        until = time.monotonic() + seconds
        for event, mark in self.spool.waiting():
            try:
                taken = self._deliver(event)
            except UnreachableError as error:
                self._server_away(error)
                break
            self.spool.accepted(mark)
            delivered, rejected = delivered + taken, rejected + (not taken)
            if time.monotonic() >= until:
                break
        waiting = len(self.spool)
        if delivered and not waiting and self._away:
            log.warning("MLflow answers again: the %d events that waited are delivered", delivered)
            self._away, self._pause = False, self._first_pause
        return Counts(delivered, rejected, waiting)

    def _deliver(self, event: Event) -> bool:
        """Whether the server took it; a refused event is put aside with a warning."""
        try:
            self._courier.deliver(event)
        except RejectedError as error:
            file = self.spool.reject(event, str(error))
            log.warning("MLflow refused an event (%s), kept in %s: %s", event["op"], file, error)
            return False
        return True

    def _server_away(self, error: UnreachableError) -> None:
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS) if self._away else self._first_pause
        self._retry_at = time.monotonic() + self._pause
        if not self._away:
            log.warning(
                "MLflow does not answer (%s). The run goes on; its events wait in %s and are delivered "
                "in order once the server is back",
                error,
                self.spool.path,
            )
        self._away = True
