"""CPU time and memory of every grader on hostile text: 200,000 characters cost it seconds at most."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress

import pytest
from bounds import cpu_below
from reward_cases import completion

from frpo.rewards.answers import Boxed, ExactAnswer, Hashes, LastNumber, Pattern
from frpo.rewards.judges.asking import MalformedAnswerError
from frpo.rewards.judges.chat import chat_text, without_control
from frpo.rewards.judges.harmbench_chat import HarmBenchChat
from frpo.rewards.judges.moderation import largest_score
from frpo.rewards.judges.strongreject_rubric import StrongRejectRubric
from frpo.rewards.judges.xstest import XSTestJudge
from frpo.rewards.maths import MathAnswer
from frpo.rewards.rules import Caution, KeywordOverlap, Length, RefusalPhrases, Regex, Repetition, StepList

LENGTH = 200_000
SECONDS = 3.0  # of CPU time; the worst takes a fifth
MEBIBYTES = 200
PIECES = [
    *("a", " ", "\n", "1", "1,", "0/", "{", "}", "\\boxed{", "\\boxed{1}", "#### ", "```", "- ", "   step", "\\frac"),
    *("\\text{", "{,}", "9,999", "I can't ", "\u0130", "\0", "1.b", "1.b 5\n", "#*_>- ", "<|", "[/INST"),
]


def repeated(piece: str) -> str:
    return (piece * (LENGTH // len(piece) + 1))[:LENGTH]


def bounded(call, given, refusals=()):
    tracemalloc.start()
    try:
        with cpu_below(SECONDS), suppress(*refusals):
            call(given)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEBIBYTES * 2**20, f"took {peak / 2**20:.0f} MiB"


GRADERS = [
    RefusalPhrases(), Caution(), Regex(r"(a+)+$"), Regex(r"(?:\s*\w+\s*)*!"), Length(high=10), KeywordOverlap(),
    Repetition(), StepList(), ExactAnswer(), ExactAnswer(extract=[Pattern(r"(?i)(?:a|1|\s)+answer is:?\s*(\S+)")]),
    MathAnswer(),
]  # fmt: skip


@pytest.mark.parametrize("grader", GRADERS, ids=lambda grader: type(grader).__name__)
def test_a_rule_is_bounded_in_time_and_memory(grader):
    for piece in PIECES:
        bounded(grader, [completion(repeated(piece), answer="18")])


@pytest.mark.parametrize("find", [Boxed(), Hashes(), LastNumber()], ids=lambda find: type(find).__name__)
def test_an_extractor_is_bounded_in_time_and_memory(find):
    for piece in PIECES:
        bounded(find, repeated(piece))


@pytest.mark.parametrize("judge", [StrongRejectRubric, HarmBenchChat, XSTestJudge])
def test_the_reader_of_an_answer_is_bounded(judge):
    read = judge.__new__(judge).read
    for piece in PIECES:
        bounded(read, repeated(piece) * 5, (MalformedAnswerError,))


def test_the_fields_of_a_reply_are_read_in_bounds():
    deep = json.loads("[" * 900 + "]" * 900)
    huge = {"results": [{"category_scores": {"a": 10**400}}]}
    for body in (deep, {"choices": deep}, {"results": deep}, huge, 1, None):
        bounded(chat_text, body, (MalformedAnswerError,))
        bounded(largest_score, body, (MalformedAnswerError,))
    many = {"results": [{"category_scores": {str(i): 0.5 for i in range(100_000)}}]}
    bounded(largest_score, many)


def test_what_a_judge_is_sent_is_cleaned_in_bounds():
    for piece in PIECES:
        bounded(without_control, repeated(piece) * 5)
