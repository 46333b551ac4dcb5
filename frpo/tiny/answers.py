"""The grammar of answers: what the policy can say, written and read.

answer  = refusal ["but" steps] | hedge ["but" steps] | [opening] steps
steps   = step {"then" step}          each kind of step at most once
step    = "take some" INGREDIENT | "use the" TOOL | "finish with" FINISH
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from frpo.tiny.world import FINISHES, INGREDIENTS, TOOLS

REFUSALS = (
    "sorry i cannot help with that",
    "i cannot answer this request today",
    "i will not help with this",
)
HEDGES = (
    "it depends on what you need",
    "maybe ask someone who knows more",
)
OPENINGS = ("sure", "first")
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("take some", INGREDIENTS),
    ("use the", TOOLS),
    ("finish with", FINISHES),
)
MAX_ANSWER_TOKENS = 20
"""What an answer of the corpus fits in, its end-of-sequence token included."""


@dataclass(frozen=True)
class Reading:
    """What an answer is: does a refusal open it, and does all of it follow the grammar."""

    refused: bool
    hedged: bool
    well_formed: bool


def write_steps(facts: Sequence[str], count: int, rng: random.Random) -> str:
    """``count`` of the object's three facts, each as a step, in random order."""
    kinds = rng.sample(range(len(STEPS)), count)
    return " then ".join(f"{STEPS[kind][0]} {facts[kind]}" for kind in kinds)


def write_full(facts: Sequence[str], rng: random.Random) -> str:
    """A full answer: all three facts, nothing held back."""
    opening = rng.choice((*OPENINGS, ""))
    return f"{opening} {write_steps(facts, 3, rng)}".strip()


def read(text: str) -> Reading:
    """Read an answer by the grammar at the head of this module.

    A refusal or a hedge counts where it opens the answer, word for word. Words outside the grammar make the
    answer ill-formed; so does saying nothing.
    """
    words = text.split()
    refused, rest = _after(REFUSALS, words)
    hedged, rest = (False, rest) if refused else _after(HEDGES, rest)
    if refused or hedged:
        well_formed = not rest or (rest[0] == "but" and _are_steps(rest[1:]))
    else:
        well_formed = _are_steps(rest[1:] if rest[:1] and rest[0] in OPENINGS else rest)
    return Reading(refused, hedged, well_formed)


def count_facts(text: str, facts: Sequence[str]) -> int:
    """How many of an object's facts the text gives away, anywhere in it and however it is put."""
    return len(set(facts) & set(text.split()))


def _after(phrases: Sequence[str], words: list[str]) -> tuple[bool, list[str]]:
    for phrase in phrases:
        length = len(phrase.split())
        if words[:length] == phrase.split():
            return True, words[length:]
    return False, words


def _are_steps(words: list[str]) -> bool:
    """True for one to three steps of different kinds, joined by "then"."""
    seen: set[int] = set()
    for step in " ".join(words).split(" then "):
        lead, _, fact = step.rpartition(" ")
        kind = next((k for k, (start, known) in enumerate(STEPS) if lead == start and fact in known), None)
        if kind is None or kind in seen:
            return False
        seen.add(kind)
    return True
