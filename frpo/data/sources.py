"""What the sources of prompts, demonstrations and preferences share."""

from __future__ import annotations

from abc import ABC
from typing import Generic, TypeVar

from frpo.foundation import require


class Source(ABC):  # noqa: B024 - how rows are read differs by kind
    """A finite list of rows in a fixed order. Constructors are cheap: rows are read when they are asked for."""

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch what is read. Called first, on one process of each machine."""


AnySource = TypeVar("AnySource", bound=Source)


class Joined(Source, Generic[AnySource]):
    """Several sources of one kind, one after the other. A subclass says how they are read.

    Args:
        sources: At least one. Their ``limit`` sets the mixture.
    """

    def __init__(self, sources: list[AnySource]) -> None:
        self.sources = require.non_empty(f"{type(self).__name__}.sources", sources)

    def prepare(self) -> None:
        """Let every source fetch what it reads."""
        for source in self.sources:
            source.prepare()
