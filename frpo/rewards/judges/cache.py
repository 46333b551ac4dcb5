"""Answers of judges on disk, so that an evaluation that is killed and started again does not pay for them twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

_BUSY_S = 60.0  # how long a write waits for another process's


def question_key(url_path: str, model: str, revision: str | None, body: Mapping[str, Any]) -> str:
    """The sha256 of everything the answer depends on; the host is left out, so that a judge may move."""
    question = [url_path, model, revision, body]
    text = json.dumps(question, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """JSON values by key in one SQLite file (write-ahead log), shared by threads and processes of one machine.

    Every call opens a connection of its own, so a cache survives forks and pickling, and what is put survives the
    death of the process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def setup(self) -> None:
        """Create the file and its folder where there are none.

        Raises:
            ValueError: the file is something else.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._connected() as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"cache: got {str(self.path)!r}, expected a file to create or one written as a cache before "
                f"({error}); name another path"
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """The values of those ``keys`` that are known."""
        with self._connected() as connection:
            query = "SELECT key, value FROM answers WHERE key IN (SELECT value FROM json_each(?))"
            return {key: json.loads(value) for key, value in connection.execute(query, [json.dumps(keys)])}

    def put(self, key: str, value: Any) -> None:
        """Keep ``value``."""
        with self._connected() as connection:
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", [key, json.dumps(value)])

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_BUSY_S)) as connection, connection:
            connection.execute("PRAGMA synchronous=NORMAL")  # no wait for the disk: a power cut may cost answers
            yield connection
