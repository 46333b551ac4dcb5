"""The Reward protocol: completions in, one judgement each out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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

    @classmethod
    def asking(cls, id: str, revision: str | None, text: str) -> JudgeIdentity:
        """The identity of a judge that is asked with ``text``."""
        return cls(id, revision, hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def combined(cls, name: str, parts: Mapping[str, JudgeIdentity]) -> JudgeIdentity:
        """One identity of many: ``id`` names them all; revisions and hashes are joined in the order of the parts."""
        revisions = [part.revision for part in parts.values() if part.revision is not None]
        hashes = [part.template_hash for part in parts.values() if part.template_hash is not None]
        return cls(
            id=f"{name}({', '.join(f'{part}={identity.id}' for part, identity in parts.items())})",
            revision="+".join(revisions) or None,
            template_hash="+".join(hashes) or None,
        )


class Reward(ABC):
    """Scores completions. Calling it returns one :class:`~frpo.types.Judgement` per completion, in order.

    A reward that cannot judge a row returns ``Judgement.failed``; one that does not apply to it returns
    ``Judgement.abstain``. Neither is ever a number. Constructors are cheap: what is heavy is built in :meth:`setup`.
    """

    def parts(self) -> Mapping[str, Reward]:
        """The rewards that this one is made of, by name; none by default. What follows passes on to them."""
        return {}

    @property
    def collective(self) -> bool:
        """Whether all ranks judge together: each must make every call that another makes, with no completions too."""
        return any(part.collective for part in self.parts().values())

    def setup(self, device: torch.device) -> None:
        """Build what is heavy (models, clients) once, before the first call."""
        for part in self.parts().values():
            part.setup(device)

    def check_tasks(self, tasks: set[str]) -> None:
        """Raise ``ValueError`` before the first step where the data holds a task this reward cannot route."""
        for part in self.parts().values():
            part.check_tasks(tasks)

    def identity(self) -> JudgeIdentity:
        """Who judges: the parts, or the class where there is neither a part, a model nor a template."""
        parts = {name: part.identity() for name, part in self.parts().items()}
        if parts:
            return JudgeIdentity.combined(type(self).__name__, parts)
        return JudgeIdentity(f"{type(self).__module__}.{type(self).__qualname__}")

    @abstractmethod
    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion."""
