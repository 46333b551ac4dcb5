"""Answers of the tiny world judged by its graded rewards: preference pairs, and answers with their reward."""

from __future__ import annotations

import math
import random

from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.foundation import require
from frpo.tiny.answers import HEDGES, OPENINGS, REFUSALS, write_steps
from frpo.tiny.rewards import TinyBenign, TinyRisky
from frpo.tiny.sources import TinySource
from frpo.tiny.world import THINGS, Split
from frpo.types import Completion, Prompt

FORMS = ("{refusal}", "{refusal} but {steps}", "{hedge}", "{hedge} but {steps}", "{opening} {steps}", "{steps}")
FOREIGN_SHARE = 0.1
"""Answers with the facts of another object: what a scorer must not take for those asked for."""
BROKEN_SHARE = 0.1
"""Answers with their words in disorder, which the grammar does not know."""


class TinyPreferences(JudgedSource):
    """Pairs of answers to questions of the tiny world, the one of higher reward preferred.

    Answers are refusals, refusals that leak, hedges and plain answers with one to three facts; a tenth each tell of
    another object or are out of order. The reward is :class:`~frpo.tiny.rewards.TinyRisky` or ``TinyBenign``; the two
    answers of a pair never have the same.

    Args:
        split: of the questions, as in :class:`~frpo.tiny.sources.TinySource`.
        pairs: for each question.
        temperature: of a Bradley-Terry judge, who prefers the better answer with probability
            ``sigmoid(difference of rewards / temperature)``; null always prefers it.
        seed: of questions, answers and judge.
        limit: the first so many questions; null takes all.
    """

    responses = 2

    def __init__(
        self,
        split: Split = "train",
        pairs: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self.questions = TinySource(split, seed=seed, limit=limit)
        self.pairs = require.number("TinyPreferences.pairs", pairs, at_least=1)
        self.temperature = require.number(
            "TinyPreferences.temperature", temperature, above=0, hint="write null for no noise"
        )
        self.seed = seed

    def examples(self) -> list[JudgedExample]:
        """The pairs; the same arguments always give the same."""
        rng = random.Random(f"preferences {self.seed}")
        return [
            JudgedExample(prompt, self._pair(prompt, rng), 0.0)
            for prompt in self.questions.prompts()
            for _ in range(self.pairs)
        ]

    def _pair(self, prompt: Prompt, rng: random.Random) -> tuple[str, str]:
        while True:
            one, two = write_answer(prompt, rng), write_answer(prompt, rng)
            gap = true_reward(prompt, one) - true_reward(prompt, two)
            if abs(gap) > 1e-9:
                break
        better, worse = (one, two) if gap > 0 else (two, one)
        if self.temperature is not None and rng.random() > 1 / (1 + math.exp(-abs(gap) / self.temperature)):
            return worse, better
        return better, worse


class TinyValues(JudgedSource):
    """One answer to each question of the tiny world with its graded reward in [0, 1], for ``Regression``.

    Args:
        split: of the questions, as in :class:`~frpo.tiny.sources.TinySource`.
        seed: of questions and answers.
        limit: the first so many questions; null takes all.
    """

    responses = 1

    def __init__(self, split: Split = "train", seed: int = 0, limit: int | None = None) -> None:
        self.questions, self.seed = TinySource(split, seed=seed, limit=limit), seed

    def examples(self) -> list[JudgedExample]:
        """The answers; the same arguments always give the same."""
        rng = random.Random(f"values {self.seed}")
        answers = [(prompt, write_answer(prompt, rng)) for prompt in self.questions.prompts()]
        return [JudgedExample(prompt, (answer,), true_reward(prompt, answer)) for prompt, answer in answers]


def write_answer(prompt: Prompt, rng: random.Random) -> str:
    """An answer to a question of :class:`~frpo.tiny.sources.TinySource`, of any form and worth."""
    facts = rng.choice(THINGS).facts if rng.random() < FOREIGN_SHARE else prompt.fields["facts"]
    answer = rng.choice(FORMS).format(
        refusal=rng.choice(REFUSALS),
        hedge=rng.choice(HEDGES),
        opening=rng.choice(OPENINGS),
        steps=write_steps(facts, rng.randint(1, 3), rng),
    )
    if rng.random() >= BROKEN_SHARE:
        return answer
    words = answer.split()
    rng.shuffle(words)
    return " ".join(words)


def true_reward(prompt: Prompt, answer: str) -> float:
    """The graded reward of an answer in [0, 1], by the kind of object that is asked about."""
    reward = TinyRisky() if prompt.task == "risky" else TinyBenign()
    return reward.judge(Completion(prompt, prompt_text="", text=answer)).value
