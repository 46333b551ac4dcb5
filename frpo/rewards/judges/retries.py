"""How long to wait before asking again."""

from __future__ import annotations

import math
import random
import time
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})


def wait_s(retry: int, retry_after: str | None, *, first_s: float, longest_s: float, draw: random.Random) -> float:
    """Seconds to wait before retry number ``retry`` (from 0): exponential back-off with full jitter.

    The wait is uniform in [0, min(``longest_s``, ``first_s`` 2^retry)]. A Retry-After header is honoured up to
    ``longest_s``, with jitter of up to ``first_s`` on top: callers sent away together do not come back together.
    """
    jitter = draw.uniform(0.0, min(longest_s, first_s * 2.0 ** min(retry, 60)))
    asked = retry_after_s(retry_after)
    return jitter if asked is None else min(asked, longest_s) + min(jitter, first_s)


def retry_after_s(header: str | None) -> float | None:
    """Seconds from now that a Retry-After header asks for (a number or a date); None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
