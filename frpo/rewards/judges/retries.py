"""How long to wait before asking again."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off with full jitter: a wait uniform in [0, min(``longest_s``, ``first_s`` 2^k)].

    A server's Retry-After is honoured up to ``longest_s`` and the jitter comes on top, so that callers it sends away
    together do not come back together.
    """

    first_s: float
    longest_s: float

    def wait_s(self, retry: int, retry_after: str | None, draw: random.Random) -> float:
        """Seconds to wait before retry number ``retry`` (from 0); ``retry_after`` is the header, if any."""
        jitter = draw.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(retry, 60)))
        asked = retry_after_s(retry_after)
        return jitter if asked is None else min(asked, self.longest_s) + min(jitter, self.first_s)


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
