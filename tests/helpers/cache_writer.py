"""Writes to a cache from a process of its own; imports little, so that such a process starts soon."""

from __future__ import annotations

from pathlib import Path

from frpo.rewards.judges.cache import AnswerCache


def write(path: Path, worker: int) -> None:
    cache = AnswerCache(path)
    cache.setup()
    for i in range(50):
        cache.put(f"{worker}-{i}", [worker, i])
