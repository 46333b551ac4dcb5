"""One round of questions to a server: requests, retries, and when to give up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import requests
from requests.auth import AuthBase

from frpo.rewards.judges.cache import Answers
from frpo.rewards.judges.retries import RETRIED_STATUSES, Backoff

T = TypeVar("T")

_REFUSALS = frozenset({301, 302, 303, 307, 308, 401, 403, 404})
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
class Settings:
    """How patiently to ask, see :class:`~frpo.rewards.judges.client.Endpoint`."""

    connect_timeout_s: float
    read_timeout_s: float
    deadline_s: float
    retries: int
    backoff: Backoff
    give_up_after: int | None


@dataclass(frozen=True)
class _Reply:
    """What one request came to: ``status`` None where no complete answer arrived."""

    problem: str
    retried: bool
    status: int | None = None
    text: str = ""
    retry_after: str | None = None

    @property
    def good(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class _Bearer(AuthBase):
    """The key as a header of this request alone; also without a key, so that none is taken from a .netrc file."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Asking(Generic[T]):
    """What the threads of one round share. ``refusal`` is the latest message that refused key, model or path."""

    def __init__(
        self, url: str, key: str | None, settings: Settings, read: Callable[[Any], T], cache: Answers | None
    ) -> None:
        self.url = url
        self.settings = settings
        self.read = read
        self.cache = cache
        self.answered = False
        self.refusal: str | None = None
        self._key = key
        self._refused = self._exhausted_in_a_row = 0
        self._stopped, self._why = threading.Event(), ""
        self._lock = threading.Lock()
        self._draw = random.Random()  # its own: waits do not move the run's random numbers
        self._local = threading.local()
        self._sessions: list[requests.Session] = []

    def ask(self, key: str, body: Mapping[str, Any], allowed_refusals: int | None) -> T | NoAnswer:
        """The answer to ``body``, kept in the cache under ``key``; or why there is none.

        After ``allowed_refusals`` refusals without any answer the whole round stops; None for no such bound.
        """
        reply = self._reply(body)
        if isinstance(reply, NoAnswer):
            return reply
        with self._lock:
            self.answered = self.answered or reply.good
            self._exhausted_in_a_row = 0
            if reply.status in _REFUSALS:
                self._refused += 1
                self.refusal = reply.problem
                if allowed_refusals is not None and not self.answered and self._refused >= allowed_refusals:
                    self.stop(reply.problem)
        return self._read(key, reply.text) if reply.good else NoAnswer(reply.problem)

    def stop(self, why: str) -> None:
        """Answer every question that is not on the wire with ``why``."""
        self._why = self._why or why
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            session.close()

    def _read(self, key: str, text: str) -> T | NoAnswer:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            return NoAnswer("malformed answer: not JSON")
        try:
            value = self.read(answer)
        except MalformedAnswerError as error:
            return NoAnswer(f"malformed answer: {error}")
        if self.cache is not None:
            self.cache.put(key, answer)
        return value

    def _reply(self, body: Mapping[str, Any]) -> _Reply | NoAnswer:
        """The first reply that no retry could better; none once retries or deadline are used up."""
        deadline = time.monotonic() + self.settings.deadline_s
        retry = 0
        while not self._stopped.is_set():
            reply = self._send(body, deadline)
            if not reply.retried:
                return reply
            if retry == self.settings.retries:
                return self._exhausted(f"no answer after {retry + 1} request(s), the last: {reply.problem}")
            wait = self.settings.backoff.wait_s(retry, reply.retry_after, self._draw)
            if time.monotonic() + wait >= deadline:
                return self._exhausted(f"no answer within {self.settings.deadline_s:g} s, the last: {reply.problem}")
            self._stopped.wait(wait)
            retry += 1
        return NoAnswer(self._why)

    def _exhausted(self, reason: str) -> NoAnswer:
        with self._lock:
            self._exhausted_in_a_row += 1
            limit = self.settings.give_up_after
            if limit is not None and self._exhausted_in_a_row >= limit:
                self.stop(f"not asked: {limit} questions in a row had no answer; {reason}")
        return NoAnswer(reason)

    def _send(self, body: Mapping[str, Any], deadline: float) -> _Reply:
        left = max(0.001, deadline - time.monotonic())
        timeout = (min(self.settings.connect_timeout_s, left), min(self.settings.read_timeout_s, left))
        try:
            with self._session().post(
                self.url,
                json=body,
                headers=_PLAIN,
                auth=_Bearer(self._key),
                timeout=timeout,
                stream=True,
                allow_redirects=False,
            ) as response:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    return _Reply("malformed answer: compressed, though none was asked for", retried=False)
                content = bytearray()
                for chunk in response.iter_content(_CHUNK):
                    content += chunk
                    if time.monotonic() > deadline:
                        return _Reply("an answer without end", retried=True)
                    if len(content) > _LARGEST_ANSWER:
                        return _Reply(f"malformed answer: over {_LARGEST_ANSWER} bytes", retried=False)
        except _BROKEN as error:
            return _Reply(type(error).__name__, retried=True)
        text = self._without_key(content.decode("utf-8", errors="replace"))
        retried = response.status_code in RETRIED_STATUSES
        problem = f"HTTP {response.status_code}" + ("" if retried else _message(text))
        return _Reply(problem, retried, response.status_code, text, response.headers.get("Retry-After"))

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            with self._lock:
                self._sessions.append(self._local.session)
        return self._local.session

    def _without_key(self, text: str) -> str:
        """Servers quote keys in their messages."""
        if self._key is None or len(self._key) < _SHORTEST_SECRET:
            return text
        return text.replace(self._key, "[key]")


def _message(text: str) -> str:
    """What a server says went wrong, on one short line."""
    try:
        said = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = text
    line = " ".join(said.split())
    return f": {line[:_EXCERPT]}" if line else ""
