"""One request to a judge's server, and what it came to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from requests.auth import AuthBase

from frpo.rewards.judges.retries import RETRIED_STATUSES

_BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
_LARGEST_ANSWER = 2**20  # bytes; a judge's answer is a few thousand
_PLAIN = {"Accept-Encoding": "identity"}  # a compressed kilobyte can stand for gigabytes
_CHUNK = 1024  # bytes read between two looks at the clock
_EXCERPT = 200  # characters of a server's message that reach a reason
_SHORTEST_SECRET = 12  # characters; shorter keys are stand-ins such as EMPTY, and words of answers


class MalformedAnswerError(ValueError):
    """An answer that cannot be read; the message becomes the reason of the failed judgement."""


@dataclass(frozen=True)
class NoAnswer:
    """Why a question has none."""

    reason: str


@dataclass(frozen=True)
class Reply:
    """What one request came to: ``status`` is None where no complete answer arrived, ``problem`` says what is wrong."""

    problem: str
    retried: bool
    status: int | None = None
    text: str = ""
    retry_after: str | None = None

    @property
    def good(self) -> bool:
        """Whether the server answered the question."""
        return self.status is not None and 200 <= self.status < 300


class _Bearer(AuthBase):
    """The key as a header of this request alone; also without a key, so that none is taken from a .netrc file."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def post(
    session: requests.Session,
    url: str,
    body: Mapping[str, Any],
    *,
    key: str | None,
    timeouts_s: tuple[float, float],
    deadline: float,
) -> Reply:
    """Send ``body`` once. ``timeouts_s`` bound connecting and silence; ``deadline`` is a time of the monotonic clock.

    A compressed answer, one over 1 MiB and one that goes on past the deadline are given up.
    """
    left = max(0.001, deadline - time.monotonic())
    try:
        with session.post(
            url,
            json=body,
            headers=_PLAIN,
            auth=_Bearer(key),
            timeout=(min(timeouts_s[0], left), min(timeouts_s[1], left)),
            stream=True,
            allow_redirects=False,
        ) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                return Reply("malformed answer: compressed, though none was asked for", retried=False)
            content = bytearray()
            for chunk in response.iter_content(_CHUNK):
                content += chunk
                if time.monotonic() > deadline:
                    return Reply("an answer without end", retried=True)
                if len(content) > _LARGEST_ANSWER:
                    return Reply(f"malformed answer: over {_LARGEST_ANSWER} bytes", retried=False)
    except _BROKEN as error:
        return Reply(type(error).__name__, retried=True)
    text = content.decode("utf-8", errors="replace")
    if key is not None and len(key) >= _SHORTEST_SECRET:  # servers quote keys in their messages
        text = text.replace(key, "[key]")
    retried = response.status_code in RETRIED_STATUSES
    problem = f"HTTP {response.status_code}" + ("" if retried else _message(text))
    return Reply(problem, retried, response.status_code, text, response.headers.get("Retry-After"))


def _message(text: str) -> str:
    """What a server says went wrong, on one short line."""
    try:
        said = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = text
    line = " ".join(said.split())
    return f": {line[:_EXCERPT]}" if line else ""
