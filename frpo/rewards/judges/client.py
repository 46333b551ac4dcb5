"""A server of the OpenAI-compatible interface, asked many questions at once."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from frpo.foundation import require
from frpo.rewards.calls import UnusableRewardError
from frpo.rewards.judges.asking import MalformedAnswerError, NoAnswer, Reply, post
from frpo.rewards.judges.cache import AnswerCache, question_key
from frpo.rewards.judges.retries import wait_s

T = TypeVar("T")

_REFUSALS = frozenset({301, 302, 303, 307, 308, 401, 403, 404})


class Endpoint:
    """Where a judge is asked: server, model, key, and how patiently.

    A request that ends in 429, 500, 502, 503, 504, a broken connection or a timeout is sent again, after an exponential
    back-off with full jitter or what Retry-After asks for; no other is. A question that got no answer has a reason
    instead, never a number. 401, 403, 404 and redirects, before anything was ever answered, stop the run. Equal
    questions of one call are sent once.

    The key is read from the environment when it is needed and stands in no attribute, file or message.

    Args:
        base_url: as ``https://api.openai.com/v1``; the interface's paths are appended.
        model: as the server calls it.
        revision: of the model, where you know it: kept with every score, and a part of the cache's key.
        api_key_env: name of the environment variable that holds the key; null sends none.
        cache: SQLite file for well-formed answers, shared by processes of one machine; null keeps none. A question
            in it is the path, model, revision and request, not the host.
        concurrency: requests in flight, in each process.
        connect_timeout_s: seconds a connection may take.
        read_timeout_s: seconds of silence a server may take.
        deadline_s: seconds a question may take with all its retries; a last read may end after it.
        retries: of one question.
        first_wait_s: bound of the first wait; doubles with every retry.
        longest_wait_s: bound of a single wait, also of Retry-After.
        give_up_after: questions in a row whose retries are used up, after which the rest of the call fails at once;
            null never gives up.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        revision: str | None = None,
        api_key_env: str | None = None,
        cache: str | None = None,
        concurrency: int = 8,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        retries: int = 5,
        first_wait_s: float = 0.5,
        longest_wait_s: float = 30.0,
        give_up_after: int | None = 16,
    ) -> None:
        require.non_empty("Endpoint.model", model, "name the model as the server calls it")
        if api_key_env is not None and not api_key_env.isidentifier():
            raise ValueError(
                "Endpoint.api_key_env: got no name of an environment variable, expected one as OPENAI_API_KEY: the key "
                "itself does not belong into a configuration"
            )
        self.base_url = _checked_url(base_url)
        self.model = model
        self.revision = revision
        self.api_key_env = api_key_env
        self.cache = None if cache is None else AnswerCache(cache)
        self.concurrency = require.number("Endpoint.concurrency", concurrency, at_least=1)
        self.timeouts_s = (
            require.number("Endpoint.connect_timeout_s", connect_timeout_s, above=0),
            require.number("Endpoint.read_timeout_s", read_timeout_s, above=0),
        )
        self.deadline_s = require.number("Endpoint.deadline_s", deadline_s, above=0)
        self.retries = require.number("Endpoint.retries", retries, at_least=0)
        self.longest_wait_s = require.number("Endpoint.longest_wait_s", longest_wait_s, at_least=0)
        self.first_wait_s = require.number(
            "Endpoint.first_wait_s", first_wait_s, at_least=0, at_most=longest_wait_s, hint="see longest_wait_s"
        )
        self.give_up_after = require.number("Endpoint.give_up_after", give_up_after, at_least=1)
        self._answered = False

    def setup(self) -> None:
        """Check the key and open the cache.

        Raises:
            ValueError: the environment holds no usable key, or the cache's file is something else.
        """
        self.key()
        if self.cache is not None:
            self.cache.setup()

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[Any], T]) -> list[T | NoAnswer]:
        """Post each of ``bodies`` to ``base_url`` + ``path`` and ``read`` the JSON of the answers: one result each,
        in order.

        ``read`` raises :class:`~frpo.rewards.judges.asking.MalformedAnswerError` on what it cannot read; such an answer
        is not cached, and a cached one that it can no longer read is asked for again.

        Raises:
            UnusableRewardError: the server refuses key, model or path, and has answered nothing yet.
        """
        url = self.base_url + path
        keys = [question_key(urlsplit(url).path, self.model, self.revision, body) for body in bodies]
        questions = dict(zip(keys, bodies, strict=True))
        results: dict[str, T | NoAnswer] = {}
        for key, answer in (self.cache.get(list(questions)) if self.cache else {}).items():
            with suppress(MalformedAnswerError):
                results[key] = read(answer)
        todo = {key: body for key, body in questions.items() if key not in results}
        if todo:
            asking = _Round(self, url, read, self._answered)
            results.update(asking.ask_all(todo))
            self._answered = asking.answered
            if asking.refusal is not None and not asking.answered:
                raise UnusableRewardError(
                    f"Endpoint: {url} refused model {self.model!r}: {asking.refusal}. {self._hint()}"
                )
        return [results[key] for key in keys]

    def key(self) -> str | None:
        """The key that the environment holds now, None where none is to be sent."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            got = "one with blanks or unprintable characters" if key else "none"
            raise ValueError(
                f"Endpoint.api_key_env: got {got} in the environment variable {self.api_key_env!r}, expected the key "
                f"of {self.base_url}: `export {self.api_key_env}=...`, or api_key_env: null where the server needs none"
            )
        return key

    def _hint(self) -> str:
        key = "none is sent: set api_key_env" if self.api_key_env is None else f"it is read from {self.api_key_env}"
        return f"Expected a server that answers: check base_url, model, and the key ({key})"


class _Round(Generic[T]):
    """What the threads of one :meth:`Endpoint.ask` share. ``refusal`` is the latest that refused key, model or path."""

    def __init__(self, endpoint: Endpoint, url: str, read: Callable[[Any], T], answered: bool) -> None:
        self.endpoint, self.url, self.read = endpoint, url, read
        self.answered = answered
        self.refusal: str | None = None
        self._key = endpoint.key()
        self._refused = self._exhausted_in_a_row = 0
        self._stopped, self._why = threading.Event(), ""
        self._lock = threading.Lock()
        self._draw = random.Random()  # its own: waits do not move the run's random numbers

    def ask_all(self, todo: Mapping[str, Mapping[str, Any]]) -> dict[str, T | NoAnswer]:
        """The answer to each question by its key, or why there is none."""
        workers = min(self.endpoint.concurrency, len(todo))
        with requests.Session() as session, ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
            session.mount(self.url, HTTPAdapter(pool_maxsize=workers))
            futures = {key: pool.submit(self._ask, session, key, body) for key, body in todo.items()}
            try:
                return {key: future.result() for key, future in futures.items()}
            except BaseException:
                self._stop("interrupted")
                raise

    def _ask(self, session: requests.Session, key: str, body: Mapping[str, Any]) -> T | NoAnswer:
        reply = self._reply(session, body)
        if isinstance(reply, NoAnswer):
            return reply
        with self._lock:
            self.answered = self.answered or reply.good
            self._exhausted_in_a_row = 0
            if reply.status in _REFUSALS:
                self._refused += 1
                self.refusal = reply.problem
                if not self.answered and self._refused >= self.endpoint.concurrency:
                    self._stop(reply.problem)
        return self._read(key, reply.text) if reply.good else NoAnswer(reply.problem)

    def _read(self, key: str, text: str) -> T | NoAnswer:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            return NoAnswer("malformed answer: not JSON")
        try:
            value = self.read(answer)
        except MalformedAnswerError as error:
            return NoAnswer(f"malformed answer: {error}")
        if self.endpoint.cache is not None:
            self.endpoint.cache.put(key, answer)
        return value

    def _reply(self, session: requests.Session, body: Mapping[str, Any]) -> Reply | NoAnswer:
        """The first reply that no retry could better; none once retries or deadline are used up."""
        endpoint = self.endpoint
        deadline = time.monotonic() + endpoint.deadline_s
        retry = 0
        while not self._stopped.is_set():
            reply = post(session, self.url, body, key=self._key, timeouts_s=endpoint.timeouts_s, deadline=deadline)
            if not reply.retried:
                return reply
            if retry == endpoint.retries:
                return self._exhausted(f"no answer after {retry + 1} request(s), the last: {reply.problem}")
            first_s, longest_s = endpoint.first_wait_s, endpoint.longest_wait_s
            wait = wait_s(retry, reply.retry_after, first_s=first_s, longest_s=longest_s, draw=self._draw)
            if time.monotonic() + wait >= deadline:
                return self._exhausted(f"no answer within {endpoint.deadline_s:g} s, the last: {reply.problem}")
            self._stopped.wait(wait)
            retry += 1
        return NoAnswer(self._why)

    def _exhausted(self, reason: str) -> NoAnswer:
        with self._lock:
            self._exhausted_in_a_row += 1
            if self._exhausted_in_a_row == self.endpoint.give_up_after:
                self._stop(f"not asked: {self._exhausted_in_a_row} questions in a row had no answer; {reason}")
        return NoAnswer(reason)

    def _stop(self, why: str) -> None:
        """Answer every question that is not on the wire with ``why``."""
        self._why = self._why or why
        self._stopped.set()


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("Endpoint.base_url: got one with a user or password in it; expected the key in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(
            f"Endpoint.base_url: got {base_url!r}, expected one as `https://api.openai.com/v1`, without `?` or `#`"
        )
    return base_url.rstrip("/")
