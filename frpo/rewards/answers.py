"""Exact answers: extract the final answer, normalise, compare. Nothing is evaluated or executed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from fractions import Fraction

from frpo.foundation import require
from frpo.rewards.calls import RowReward
from frpo.rewards.rules import compile_pattern
from frpo.types import Completion, Judgement


class Extractor(ABC):
    """Finds the final answer in a text."""

    @abstractmethod
    def __call__(self, text: str) -> str | None:
        r"""The final answer in ``text``, or None. May raise ``TimeoutError``."""


class Boxed(Extractor):
    r"""The content of the last closed ``\boxed{...}`` or ``\fbox{...}``, braces matched; the inner one if nested."""

    _TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)

    def __call__(self, text: str) -> str | None:
        """One pass with a stack of open braces, so an unclosed box costs no more than a closed one."""
        open_at: list[int | None] = []
        last = (-1, -1)
        for token in self._TOKEN.finditer(text):
            if token[0] == "}":
                start = open_at.pop() if open_at else None
                if start is not None:
                    last = max(last, (start, token.start()))
            elif token[0] == "{":
                open_at.append(None)
            elif token[0].endswith("{") and len(token[0]) > 2:
                open_at.append(token.end())
        return text[last[0] : last[1]] if last[0] >= 0 else None


_NUMERAL = r"(?:[-+−]?\$?|\$[-+−]?)\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?"


class _LastMatch(Extractor):
    """The last match of ``PATTERN``: its one group."""

    PATTERN: re.Pattern[str]

    def __call__(self, text: str) -> str | None:
        """The last occurrence."""
        found = self.PATTERN.findall(text)
        return found[-1] if found else None


class Hashes(_LastMatch):
    """The number after the last ``####`` that is followed by one, as in GSM8K."""

    PATTERN = re.compile(rf"####[ \t]*({_NUMERAL})")


class LastNumber(_LastMatch):
    """The last number: ``-1,234.5``, ``$18`` or ``3/4``. Generous: most texts hold some number."""

    PATTERN = re.compile(rf"(?<![\w.])({_NUMERAL})")


class Pattern(Extractor):
    r"""The last match of a regular expression: its first group, or all of it. ``(?i)answer is:?\s*(\S+)``."""

    def __init__(self, pattern: str, timeout: float = 0.1) -> None:
        self.pattern = compile_pattern("Pattern.pattern", pattern)
        self.timeout = require.number("Pattern.timeout", timeout, above=0)

    def __call__(self, text: str) -> str | None:
        """The last match; ``TimeoutError`` after ``timeout`` seconds."""
        last = None
        for match in self.pattern.finditer(text, timeout=self.timeout):
            last = match
        if last is None:
            return None
        return last[1] if self.pattern.groups else last[0]


class ExactAnswer(RowReward):
    r"""``correct`` where the final answer equals the row's, ``wrong`` where not, ``missing`` where none is found.

    The row's answer is its field ``field``: a number or a string, of which what follows ``####`` or stands in the
    last ``\boxed{}`` counts, if there is one. A row without it abstains. ``extract`` are tried in order on the
    completion, the first that finds something decides; None tries :class:`Boxed`, :class:`Hashes`,
    :class:`LastNumber`. Numbers compare by value (``1,000`` = ``1000.0``, ``\frac{1}{2}`` = ``0.5``), anything
    else as text without spaces, LaTeX spacing, dollar signs and a trailing period.

    Two- or three-valued: FRPO gains from graded rewards, so mix it in a
    :class:`~frpo.rewards.compose.WeightedSum`. The published maths reward is 0.2 for the format and 0.8 for this.
    """

    def __init__(
        self,
        field: str = "answer",
        extract: list[Extractor] | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
        missing: float = 0.0,
    ) -> None:
        name = type(self).__name__
        require.non_empty(f"{name}.extract", extract, "leave it out for the default extractors")
        self.field = field
        self.extract = [Boxed(), Hashes(), LastNumber()] if extract is None else extract
        self.correct = require.number(f"{name}.correct", correct)
        self.wrong = require.number(f"{name}.wrong", wrong)
        self.missing = require.number(f"{name}.missing", missing)

    def judge(self, completion: Completion) -> Judgement:
        """Compare; abstains on a row without an answer, fails where an extractor ran out of time."""
        settled = self.settle(completion)
        return settled if isinstance(settled, Judgement) else Judgement.of(self.wrong)

    def settle(self, completion: Completion) -> Judgement | tuple[str, str]:
        """The judgement where it needs no further comparison, else the row's answer and the completion's."""
        expected = row_answer(completion, self.field)
        if not expected:
            return Judgement.abstain(f"the row has no {self.field!r}")
        try:
            answer = first_answer(self.extract, completion.text)
        except TimeoutError:
            return Judgement.failed("the pattern of an extractor took too long")
        if answer is None:
            return Judgement.of(self.missing)
        return Judgement.of(self.correct) if same_answer(answer, expected) else (expected, answer)


def row_answer(completion: Completion, field: str) -> str:
    """The answer in the row's ``field``, see :class:`ExactAnswer`; empty where there is none."""
    given = completion.prompt.fields.get(field)
    expected = "" if given is None else str(given)
    return (Hashes()(expected) or Boxed()(expected) or expected).strip()


def first_answer(extract: list[Extractor], text: str) -> str | None:
    """What the first extractor that finds something in ``text`` finds. May raise ``TimeoutError``."""
    return next(filter(None, (extractor(text) for extractor in extract)), None)


_MARKUP = (
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right)(?![a-z])|\\!|\\?\$"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s+"), " "),
    (re.compile(r"−"), "-"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"(?:\^\\circ|\^\{\\circ\}|\\?%|[.,; ])+$"), ""),
    (re.compile(r"(?<!\d) +| +(?!\d)"), ""),
    (re.compile(r"(?<!\d)\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))$"), r"\1\3/\2\4"),
)
"""Rewritten in this order. A space between digits stays: ``1 1/2`` is not ``11/2``; nor is ``1\frac{1}{2}``."""
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:([ ,])\d{3})(?:\1\d{3})*(?:\.\d*)?")
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))(?:/(\d+))?")
MAX_CHARACTERS = 1000
"""Longer answers compare as they stand: markup and exact arithmetic take quadratic time."""


def same_answer(left: str, right: str) -> bool:
    """Whether two answers are the same number, or the same text once normalised."""
    if max(len(left), len(right)) > MAX_CHARACTERS:
        return left.strip() == right.strip()
    numbers = plain_number(left), plain_number(right)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return _normal(left) == _normal(right)


def plain_number(answer: str) -> Fraction | None:
    """The value of an answer that is a number once markup and unit signs are off; None for anything else."""
    return _number(_normal(answer)) if len(answer) <= MAX_CHARACTERS else None


def _normal(answer: str) -> str:
    for pattern, replacement in _MARKUP:
        answer = pattern.sub(replacement, answer)
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "").replace(" ", "")
    return answer.casefold()


def _number(answer: str) -> Fraction | None:
    match = _NUMBER.fullmatch(answer)
    if match is None or (match[2] is not None and int(match[2]) == 0):
        return None
    return Fraction(match[1]) / int(match[2] or 1)
