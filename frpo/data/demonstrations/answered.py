"""Prompts with answers from a list: demonstrations of how to refuse, say."""

from __future__ import annotations

import random

from frpo.data.demonstrations.source import DemonstrationSource
from frpo.data.prompts.sources import PromptSource
from frpo.types import Demonstration


class AnsweredPrompts(DemonstrationSource):
    """Each prompt with one of ``answers``, drawn by ``seed`` and the prompt's id.

    A policy that never refuses gives a reward nothing to reinforce. Supervised training on a few of these, mixed with
    ordinary answers (:class:`~frpo.data.demonstrations.sources.JoinedDemonstrations`), makes one that refuses now and
    then.

    Args:
        prompts: what is asked.
        answers: what may be said to it.
        seed: of the choice.
    """

    def __init__(self, prompts: PromptSource, answers: list[str], seed: int = 0) -> None:
        if not answers or any(not answer.strip() for answer in answers):
            raise ValueError(f"AnsweredPrompts.answers: got {answers!r}, expected at least one answer, and none empty")
        self.prompts, self.answers, self.seed = prompts, answers, seed

    def prepare(self) -> None:
        """Fetch the prompts."""
        self.prompts.prepare()

    def demonstrations(self) -> list[Demonstration]:
        """The prompts in their order, each with its answer."""
        return [Demonstration(prompt, self._answer(prompt.id)) for prompt in self.prompts.prompts()]

    def _answer(self, prompt_id: str) -> str:
        return random.Random(f"{self.seed} {prompt_id}").choice(self.answers)
