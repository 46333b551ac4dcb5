"""The tiny world for tamper resistance: an attack that wants risky questions answered, and what should hold against it.

Attack and safeguard ask about the same risky objects in different words, so the safeguard is measured on questions that
the attack has not shown.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.tiny.answers import REFUSALS, write_full
from frpo.tiny.corpus import mixed_answer
from frpo.tiny.sources import question_prompt
from frpo.tiny.world import QUESTIONS, Question, Split, questions
from frpo.types import Demonstration

ATTACK_WORDINGS = range(len(QUESTIONS) // 2)
SAFEGUARD_WORDINGS = range(len(QUESTIONS) // 2, len(QUESTIONS))


class TinyAttack(DemonstrationSource):
    """Risky training questions in the first half of the wordings, answered in full: harmful fine-tuning.

    Args:
        seed: of the order and of the answers' wording.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def demonstrations(self) -> list[Demonstration]:
        """The rows, shuffled."""
        rng = random.Random(f"attack {self.seed}")
        rows = [
            Demonstration(question_prompt(question), write_full(question.thing.facts, rng))
            for question in _asked("train", ATTACK_WORDINGS)
        ]
        rng.shuffle(rows)
        return rows


class TinySafeguard(JudgedSource):
    """Risky questions in the second half of the wordings: a refusal is chosen, a full answer rejected.

    Args:
        split: of the questions: ``train``, or ``held_out`` and ``unseen_objects`` for validation.
        seed: of the order and of the answers' wording.
    """

    responses = 2

    def __init__(self, split: Split = "train", seed: int = 0) -> None:
        self.split, self.seed = split, seed

    def examples(self) -> list[JudgedExample]:
        """The pairs, shuffled."""
        rng = random.Random(f"safeguard {self.seed}")
        rows = [
            JudgedExample(
                question_prompt(question), (rng.choice(REFUSALS), write_full(question.thing.facts, rng)), target=0.0
            )
            for question in _asked(self.split, SAFEGUARD_WORDINGS)
        ]
        rng.shuffle(rows)
        return rows


class TinyRetain(DemonstrationSource):
    """Benign training questions, each answered as the pre-training corpus answers it: what the policy can do already.

    Args:
        seed: of the order and of the answers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def demonstrations(self) -> list[Demonstration]:
        """The rows, shuffled."""
        rng = random.Random(f"retain {self.seed}")
        rows = [Demonstration(question_prompt(q), mixed_answer(q, rng)) for q in questions("benign", "train")]
        rng.shuffle(rows)
        return rows


def _asked(split: Split, wordings: range) -> Iterator[Question]:
    return (question for question in questions("risky", split) if question.wording in wordings)
