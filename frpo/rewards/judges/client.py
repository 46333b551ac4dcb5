"""A server of the OpenAI-compatible interface, asked many questions at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from frpo.foundation import require
from frpo.rewards.calls import UnusableRewardError
from frpo.rewards.judges.asking import Asking, MalformedAnswerError, NoAnswer, Settings
from frpo.rewards.judges.cache import AnswerCache, Answers, question_key
from frpo.rewards.judges.retries import Backoff

T = TypeVar("T")


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
        require.number("Endpoint.longest_wait_s", longest_wait_s, at_least=0)
        require.number(
            "Endpoint.first_wait_s", first_wait_s, at_least=0, at_most=longest_wait_s, hint="see longest_wait_s"
        )
        if api_key_env is not None and not api_key_env.isidentifier():
            raise ValueError(
                "Endpoint.api_key_env: got no name of an environment variable, expected one as OPENAI_API_KEY: the key "
                "itself does not belong into a configuration"
            )
        self.base_url = _checked_url(base_url)
        self.model = require.non_empty("Endpoint.model", model, "name the model as the server calls it")
        self.revision = revision
        self.api_key_env = api_key_env
        self.cache = None if cache is None else AnswerCache(cache)
        self.concurrency = require.number("Endpoint.concurrency", concurrency, at_least=1)
        self.settings = Settings(
            connect_timeout_s=require.number("Endpoint.connect_timeout_s", connect_timeout_s, above=0),
            read_timeout_s=require.number("Endpoint.read_timeout_s", read_timeout_s, above=0),
            deadline_s=require.number("Endpoint.deadline_s", deadline_s, above=0),
            retries=require.number("Endpoint.retries", retries, at_least=0),
            backoff=Backoff(first_wait_s, longest_wait_s),
            give_up_after=require.number("Endpoint.give_up_after", give_up_after, at_least=1),
        )
        self._answered = False

    def setup(self) -> None:
        """Check the key and open the cache.

        Raises:
            ValueError: the environment holds no usable key, or the cache's file is something else.
        """
        self._key()
        if self.cache is not None:
            self.cache.setup()

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[Any], T]) -> list[T | NoAnswer]:
        """Post each of ``bodies`` to ``base_url`` + ``path`` and ``read`` the JSON of the answers: one result each,
        in order.

        ``read`` raises :class:`~frpo.rewards.judges.asking.MalformedAnswerError` on what it cannot read; such an answer
        is not cached.

        Raises:
            UnusableRewardError: the server refuses key, model or path, and has answered nothing yet.
        """
        url = self.base_url + path
        keys = [question_key(urlsplit(url).path, self.model, self.revision, body) for body in bodies]
        questions = dict(zip(keys, bodies, strict=True))
        with nullcontext() if self.cache is None else self.cache.open() as answers:
            results: dict[str, T | NoAnswer] = _readable(answers, list(questions), read)
            todo = {key: body for key, body in questions.items() if key not in results}
            if todo:
                results.update(self._ask_all(Asking(url, self._key(), self.settings, read, answers), todo))
        return [results[key] for key in keys]

    def _ask_all(self, asking: Asking[T], todo: Mapping[str, Mapping[str, Any]]) -> dict[str, T | NoAnswer]:
        allowed_refusals = None if self._answered else self.concurrency
        workers = min(self.concurrency, len(todo))
        try:
            with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
                futures = {key: pool.submit(asking.ask, key, body, allowed_refusals) for key, body in todo.items()}
                results = _results(futures, asking)
        finally:
            asking.close()
        self._answered = self._answered or asking.answered
        if asking.refusal is not None and not self._answered:
            raise UnusableRewardError(
                f"Endpoint: {asking.url} refused model {self.model!r}: {asking.refusal}. {self._hint()}"
            )
        return results

    def _hint(self) -> str:
        key = "none is sent: set api_key_env" if self.api_key_env is None else f"it is read from {self.api_key_env}"
        return f"Expected a server that answers: check base_url, model, and the key ({key})"

    def _key(self) -> str | None:
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


def _readable(answers: Answers | None, keys: Sequence[str], read: Callable[[Any], T]) -> dict[str, T | NoAnswer]:
    """What is known of ``keys``; an answer that today's rules cannot read is left out, to be asked for again."""
    found: dict[str, T | NoAnswer] = {}
    for key, answer in ({} if answers is None else answers.get(keys)).items():
        with suppress(MalformedAnswerError):
            found[key] = read(answer)
    return found


def _results(futures: Mapping[str, Future[T | NoAnswer]], asking: Asking[T]) -> dict[str, T | NoAnswer]:
    try:
        return {key: future.result() for key, future in futures.items()}
    except BaseException:
        asking.stop("interrupted")
        raise


def _checked_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        raise ValueError("Endpoint.base_url: got one with a user or password in it; expected the key in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(
            f"Endpoint.base_url: got {base_url!r}, expected one as `https://api.openai.com/v1`, without `?` or `#`"
        )
    return base_url.rstrip("/")
