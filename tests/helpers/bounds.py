"""Limits of time that a busy machine does not break."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_below(seconds: float) -> Iterator[None]:
    """Fail where the block takes this process more CPU time, in all its threads."""
    started = time.process_time()
    yield
    took = time.process_time() - started
    assert took < seconds, f"took {took:.1f} s of CPU time, expected less than {seconds:g} s"
