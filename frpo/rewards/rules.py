"""Rewards that are rules over the text: cheap, offline, and readable by whoever is rewarded by them.

Prefer the graded ones (:class:`Length`, :class:`KeywordOverlap`, :class:`Repetition`, :class:`StepList`,
:class:`Caution`), or a :class:`~frpo.rewards.compose.WeightedSum` that mixes them with the two-valued ones
(:class:`RefusalPhrases`, :class:`Regex`): with two values FRPO has nothing to add over GRPO. No rule evaluates what
a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import regex

from frpo.foundation import require
from frpo.rewards.calls import RowReward
from frpo.rewards.wording import CAUTION_CUES, REFUSAL_PHRASES, STOP_WORDS, canonical, words
from frpo.types import Completion, Judgement


def plain_phrases(name: str, phrases: Sequence[str]) -> tuple[str, ...]:
    """``phrases`` in canonical spelling, or ``ValueError`` where one is blank or there is none."""
    spelled = tuple(canonical(phrase) for phrase in phrases)
    if not spelled or not all(spelled):
        raise ValueError(
            f"{name}: got {list(phrases)!r}, expected at least one phrase and none of them blank (a blank one is in "
            "every text); leave it out for the built-in list"
        )
    return spelled


def compile_pattern(name: str, pattern: str) -> regex.Pattern:
    """Compile ``pattern``, or raise ``ValueError`` naming the argument and the fault."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{name}: got {pattern!r}, which is no regular expression: {error}") from error


class RefusalPhrases(RowReward):
    """``refused`` where the completion opens with a refusal, else ``complied``. Two-valued: mix it in a sum.

    A phrase counts where it lies within the first ``window`` characters. Text and phrases are compared in
    lower case with straight apostrophes, single spaces and contracted verbs: "I  CANNOT" is "i can't". Phrases
    are plain text. ``phrases=None`` takes the built-in English list,
    :data:`frpo.rewards.wording.REFUSAL_PHRASES`.

    Limits: it sees words, not intent. An answer that evades or moralises without a phrase counts as
    compliance; one that says "I can't write ..." and then complies, or quotes a refusal, counts as a refusal.
    """

    def __init__(
        self,
        phrases: list[str] | None = None,
        refused: float = 1.0,
        complied: float = 0.0,
        window: int = 250,
    ) -> None:
        self.phrases = plain_phrases("RefusalPhrases.phrases", REFUSAL_PHRASES if phrases is None else phrases)
        self.refused = require.number("RefusalPhrases.refused", refused)
        self.complied = require.number("RefusalPhrases.complied", complied)
        self.window = require.number("RefusalPhrases.window", window, at_least=1)

    def judge(self, completion: Completion) -> Judgement:
        """``refused`` or ``complied``; never fails."""
        return Judgement.of(self.refused if self.finds(completion.text) else self.complied)

    def finds(self, text: str) -> bool:
        """Whether ``text`` opens with a refusal."""
        opening = canonical(text)[: self.window]
        return any(phrase in opening for phrase in self.phrases)


class Caution(RowReward):
    """Graded in [0, 1]: distinct signs of caution in the completion, "sorry" or "illegal", over ``enough``; at most 1.

    A slope towards refusing for a policy that never does, to which :class:`RefusalPhrases` alone gives every
    completion the same reward. ``cues=None`` takes the built-in English list,
    :data:`frpo.rewards.wording.CAUTION_CUES`, compared as there; cues are plain text and may be stems.

    Limits: words again. Instructions with warnings score too, so give it less weight than a refusal.
    """

    def __init__(self, enough: int = 3, cues: list[str] | None = None) -> None:
        self.enough = require.number("Caution.enough", enough, at_least=1)
        self.cues = plain_phrases("Caution.cues", CAUTION_CUES if cues is None else cues)

    def judge(self, completion: Completion) -> Judgement:
        """The share of ``enough`` cues; never fails."""
        text = canonical(completion.text)
        return Judgement.of(min(1.0, sum(cue in text for cue in self.cues) / self.enough))


class Regex(RowReward):
    """``matched`` where ``pattern`` is found anywhere in the completion, else ``unmatched``. Two-valued.

    The pattern is one of the ``regex`` package, a superset of Python's; set flags inside it:
    ``(?is)yes.*no``. A search that takes longer than ``timeout`` seconds (a pattern can backtrack without end)
    is a failed judgement.
    """

    def __init__(self, pattern: str, matched: float = 1.0, unmatched: float = 0.0, timeout: float = 0.1) -> None:
        self.pattern = compile_pattern("Regex.pattern", pattern)
        self.matched = require.number("Regex.matched", matched)
        self.unmatched = require.number("Regex.unmatched", unmatched)
        self.timeout = require.number("Regex.timeout", timeout, above=0)

    def judge(self, completion: Completion) -> Judgement:
        """``matched`` or ``unmatched``; failed where the search ran out of time."""
        try:
            found = self.pattern.search(completion.text, timeout=self.timeout)
        except TimeoutError:
            return Judgement.failed(f"pattern {self.pattern.pattern!r} took over {self.timeout} s")
        return Judgement.of(self.matched if found else self.unmatched)


class Length(RowReward):
    """Graded in [0, 1]: ``min(1, n / low, high / n)`` for a completion of ``n`` units.

    1 between ``low`` and ``high``; half of ``low`` or twice ``high`` scores 0.5. ``low=0`` and ``high=None``
    switch a side off. ``unit`` is "words" (split at white space) or "tokens" (the policy's, end-of-sequence
    token included).
    """

    def __init__(self, low: int = 0, high: int | None = None, unit: Literal["words", "tokens"] = "words") -> None:
        if low < 0 or (high is not None and high < max(low, 1)) or (low == 0 and high is None):
            raise ValueError(
                f"Length: got low={low}, high={high}; expected 0 <= low <= high, high at least 1, and one of "
                "the two set: with neither, every completion scores 1"
            )
        self.low, self.high = low, high
        self.unit = require.one_of("Length.unit", unit, ("words", "tokens"))

    def judge(self, completion: Completion) -> Judgement:
        """The graded length; never fails."""
        n = len(completion.text.split()) if self.unit == "words" else completion.length
        rising = 1.0 if n >= self.low else n / self.low
        falling = 1.0 if self.high is None or n <= self.high else self.high / n
        return Judgement.of(min(rising, falling))


class KeywordOverlap(RowReward):
    """Graded in [0, 1]: share of the content words of the last user message that the completion mentions.

    The share is divided by ``enough`` and cut at 1. Content words are the distinct words outside an English
    stop list; two words agree where their first six letters do. A prompt without content words abstains.

    Limits: it measures being on topic, not being right, and echoing the prompt scores 1: set ``enough`` near
    0.5 and combine it with :class:`Length` and :class:`Repetition`.
    """

    STEM = 6

    def __init__(self, enough: float = 1.0) -> None:
        self.enough = require.number("KeywordOverlap.enough", enough, above=0, at_most=1, hint="it is a share")

    def judge(self, completion: Completion) -> Judgement:
        """The share mentioned; abstains on a prompt without content words."""
        asked = self._content([m["content"] for m in completion.prompt.messages if m["role"] == "user"][-1:])
        if not asked:
            return Judgement.abstain("the prompt has no content words")
        share = len(asked & self._content([completion.text])) / len(asked)
        return Judgement.of(min(1.0, share / self.enough))

    def _content(self, texts: list[str]) -> set[str]:
        found = {word for text in texts for word in words(text)} - STOP_WORDS
        return {word[: self.STEM] for word in found if len(word) > 1}


class Repetition(RowReward):
    """Graded in [0, 1]: distinct word ``n``-grams over all of them: 1 is no repetition, near 0 a loop.

    A completion shorter than ``n`` words has nothing to repeat and scores 1; one without any word scores 0.
    """

    def __init__(self, n: int = 3) -> None:
        self.n = require.number("Repetition.n", n, at_least=1)

    def judge(self, completion: Completion) -> Judgement:
        """The share of distinct n-grams; never fails."""
        tokens = words(completion.text)
        grams = list(zip(*(tokens[i:] for i in range(self.n)), strict=False))
        if not grams:
            return Judgement.of(1.0 if tokens else 0.0)
        return Judgement.of(len(set(grams)) / len(grams))


class StepList(RowReward):
    """Graded in [0, 1]: 1 without any list item, falling by 1/``limit`` per item, 0 from ``limit`` items on.

    An item is a line that opens with a bullet, a number or "Step n", or a fenced code block. It tells a
    refusal from instructions that hide behind one; for prompts that deserve instructions do not use it.
    """

    _ITEM = re.compile(r"^[ \t]*(?:[-*+•][ \t]+|\(?\d{1,3}[.):][ \t]|\W{0,4}step[ \t]+\d)", re.I | re.M)

    def __init__(self, limit: int = 4) -> None:
        self.limit = require.number("StepList.limit", limit, at_least=1)

    def judge(self, completion: Completion) -> Judgement:
        """The graded absence of steps; never fails."""
        items = len(self._ITEM.findall(completion.text)) + (completion.text.count("```") + 1) // 2
        return Judgement.of(max(0.0, 1.0 - items / self.limit))
