"""Deliver to MLflow what a run could not: ``frpo track replay SPOOL --tracking-uri URI``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from frpo.run.courier import Courier, check_tracking_uri
from frpo.run.outbox import Counts, Outbox
from frpo.run.spool import SPOOL_NAME, Spool


def replay(spool: Path, tracking_uri: str, timeout_s: int = 30) -> Counts:
    """Deliver the events that wait in ``spool``, in order, to the server at ``tracking_uri``.

    Stops at the first event that the server does not take; what was delivered leaves the spool, so that a second call
    goes on where this one stopped. A run whose opening waits here and that the server does not know is created.

    Raises:
        FileNotFoundError: no such spool.
        ValueError: an unusable ``tracking_uri``, or a run that is still writing the spool.
    """
    if not spool.is_file():
        raise FileNotFoundError(
            f"no spool at {spool}; give the {SPOOL_NAME} in the run's output folder, or that folder"
        )
    check_tracking_uri(tracking_uri)
    queue = Spool(spool)
    try:
        return Outbox(queue, Courier(tracking_uri, queue, timeout_s), retry_every_s=0.0).drain()
    finally:
        queue.close()


def replay_command(args: list[str]) -> int:
    """The command ``frpo track replay``: 0 when nothing waits any more, 1 when something does, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="frpo track replay", description="Deliver to MLflow the events that a run could not.", allow_abbrev=False
    )
    parser.add_argument("spool", type=Path, help=f"a run's output folder, or the {SPOOL_NAME} in it")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db", help="where MLflow is (default: %(default)s)")
    options = parser.parse_args(args)
    spool = options.spool / SPOOL_NAME if options.spool.is_dir() else options.spool
    try:
        counts = replay(spool, options.tracking_uri)
    except (FileNotFoundError, ValueError) as error:
        print(f"frpo track replay: {error}", file=sys.stderr)
        return 2
    print(f"delivered {counts.delivered}, refused {counts.rejected}, still waiting {counts.waiting}")
    return 1 if counts.waiting else 0
