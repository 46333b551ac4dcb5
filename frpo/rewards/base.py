"""The Reward protocol: completions in, one judgement each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from frpo.types import Completion, Judgement


class Reward(ABC):
    """Scores completions. Calling it returns one :class:`~frpo.types.Judgement` per completion, in order.

    A reward that cannot judge a row returns ``Judgement.failed``; one that does not apply to it returns
    ``Judgement.abstain``. Neither is ever a number. Constructors are cheap: what is heavy is built in :meth:`setup`.
    """

    def setup(self, device: torch.device) -> None:  # noqa: B027 - most rewards have nothing to build
        """Build what is heavy (models, clients) once, before the first call."""

    def check_tasks(self, tasks: set[str]) -> None:  # noqa: B027 - most rewards take every task
        """Raise ``ValueError`` before the first step where the data holds a task this reward cannot route."""

    @abstractmethod
    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion."""
