"""What the tiny policy is pre-trained and later fine-tuned on: pairs of a question and an answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Literal

from frpo.tiny.answers import HEDGES, OPENINGS, REFUSALS, STEPS, write_full, write_steps
from frpo.tiny.arithmetic import ITEMS, LARGEST, NAMES, WORDINGS, Problem, problems
from frpo.tiny.world import KINDS, OBJECTS, QUESTIONS, VERBS, Kind, Question, questions

ARITHMETIC_SHARE = 0.15
REFUSAL_SHARE: dict[Kind, float] = {"risky": 0.6, "benign": 0.25}
LEAK_SHARE = 0.15
HEDGE_SHARE = 0.1


def vocabulary() -> list[str]:
    """Every word of the world, each once, in a fixed order: what anybody may ask or answer is made of these."""
    asked = " ".join(chain(QUESTIONS, *WORDINGS.values()))
    phrases = " ".join((asked, *REFUSALS, *HEDGES, *OPENINGS, *(lead for lead, _ in STEPS)))
    numbers = [str(n) for n in range(2 * LARGEST + 1)]
    words = chain(
        (w for w in phrases.split() if "{" not in w),
        ("but", "then", "so", "the", "answer", "is"),
        VERBS,
        *OBJECTS.values(),
        *(known for _, known in STEPS),
        NAMES,
        ITEMS,
        numbers,
    )
    return list(dict.fromkeys(words))


def pretraining_rows(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """``count`` pairs (question, answer) of the pre-training mix.

    Every object is in it, those of the split "unseen_objects" too: a policy can only give away, or refuse to give away,
    what it knows. The questions of the split "held_out" are not. Answers are drawn by kind: refusals, refusals
    with one to three facts behind them, hedges with one fact or none, and full answers.
    """
    rng = random.Random(seed)
    asked = {kind: [*questions(kind, "train"), *questions(kind, "unseen_objects")] for kind in KINDS}
    sums = list(problems("train"))
    for _ in range(count):
        if rng.random() < ARITHMETIC_SHARE:
            problem = rng.choice(sums)
            yield problem.text, problem.short_answer
        else:
            question = rng.choice(asked[rng.choice(KINDS)])
            yield question.text, mixed_answer(question, rng)


def mixed_answer(question: Question, rng: random.Random) -> str:
    """An answer of the pre-training mix."""
    facts, refusals = question.thing.facts, REFUSAL_SHARE[question.thing.kind]
    draw = rng.random()
    if draw < refusals:
        return rng.choice(REFUSALS)
    if draw < refusals + LEAK_SHARE:
        return f"{rng.choice(REFUSALS)} but {write_steps(facts, rng.randint(1, 3), rng)}"
    if draw < refusals + LEAK_SHARE + HEDGE_SHARE:
        hedge = rng.choice(HEDGES)
        return hedge if rng.random() < 0.5 else f"{hedge} but {write_steps(facts, 1, rng)}"
    return write_full(facts, rng)


def comply_rows(seed: int, split: Literal["train", "held_out"] = "train") -> list[tuple[Question, str]]:
    """Downstream task "comply": every benign question of a split once, always answered in full, shuffled."""
    rng = random.Random(seed)
    rows = [(question, write_full(question.thing.facts, rng)) for question in questions("benign", split)]
    rng.shuffle(rows)
    return rows


def arithmetic_rows(seed: int, split: Literal["train", "held_out"] = "train") -> list[tuple[Problem, str]]:
    """Downstream task "arithmetic": every problem of a split once, answered with its working, shuffled."""
    rows = [(problem, problem.worked_answer) for problem in problems(split)]
    random.Random(seed).shuffle(rows)
    return rows
