"""The Reward protocol: completions in, one judgement each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frpo.types import Completion, Judgement


@dataclass(frozen=True)
class JudgeIdentity:
    """Which judge gave a score, kept with every row: a score of another judge, or another prompt to it, is another.

    ``id`` names the model or rule, ``revision`` its version where it has one, ``template_hash`` the first 16 hex
    digits of the sha256 of the text the judge is asked with.
    """

    id: str
    revision: str | None = None
    template_hash: str | None = None


class Reward(ABC):
    """Scores completions. Calling it returns one :class:`~frpo.types.Judgement` per completion, in order.

    A reward that cannot judge a row returns ``Judgement.failed``; one that does not apply to it returns
    ``Judgement.abstain``. Neither is ever a number. Constructors are cheap: what is heavy is built in :meth:`setup`.
    """

    @property
    def collective(self) -> bool:
        """Whether all ranks judge together: each must make every call that another makes, with no completions too."""
        return False

    def setup(self, device: torch.device) -> None:  # noqa: B027 - most rewards have nothing to build
        """Build what is heavy (models, clients) once, before the first call."""

    def check_tasks(self, tasks: set[str]) -> None:  # noqa: B027 - most rewards take every task
        """Raise ``ValueError`` before the first step where the data holds a task this reward cannot route."""

    def identity(self) -> JudgeIdentity:
        """Who judges; the class where there is neither a model nor a template."""
        return JudgeIdentity(f"{type(self).__module__}.{type(self).__qualname__}")

    @abstractmethod
    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion."""
