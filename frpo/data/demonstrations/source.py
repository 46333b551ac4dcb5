"""Where demonstrations come from: prompts with an answer to imitate."""

from __future__ import annotations

from abc import ABC, abstractmethod

from frpo.types import Demonstration


class DemonstrationSource(ABC):
    """Rows for supervised fine-tuning. Constructors are cheap; files are read by :meth:`demonstrations`."""

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetch what is read, on one process of each machine."""

    @abstractmethod
    def demonstrations(self) -> list[Demonstration]:
        """The rows in their order; ids are unique."""
