"""How published data sets for fine-tuning lay out their rows: which columns make the prompt, and which the answer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frpo.data.rows import check_text, kind, missing_column

ANSWER_MARK = "####"
"""What stands before the final number of an answer of GSM8K."""


@dataclass(frozen=True)
class Exchange:
    """A prompt, as text or as a list of ``{role, content}`` messages, and the answer to it."""

    prompt: str | list[Any]
    answer: str


class Layout(ABC):
    """Reads exchanges out of a row."""

    @abstractmethod
    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """The exchanges of a row, none where it is to be left out.

        Raises ``ValueError`` with the reason, without the text, where the row is not laid out so.
        """


@dataclass(frozen=True)
class PromptCompletion(Layout):
    """A prompt (text, or messages) and its answer in two columns.

    Args:
        prompt: Column with the prompt.
        completion: Column with the answer.
    """

    prompt: str = "prompt"
    completion: str = "completion"

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """One exchange."""
        return [Exchange(_value(values, self.prompt, "prompt"), _text(values, self.completion, "answer"))]


@dataclass(frozen=True)
class Alpaca(Layout):
    """Instruction, input and output, as in Stanford Alpaca: the user writes the instruction, a blank line, the input.

    Args:
        instruction: Column with the instruction.
        input: Column with its input, which may be empty.
        output: Column with the answer.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """One exchange."""
        instruction = _text(values, self.instruction, "instruction")
        return [Exchange(_with_input(instruction, values, self.input), _text(values, self.output, "answer"))]


@dataclass(frozen=True)
class SelfInstruct(Layout):
    """An instruction with a list of instances, as in the tasks of Self-Instruct (arXiv 2212.10560).

    Args:
        instruction: Column with the instruction.
        instances: Column with a list of ``{input, output}``; each is an exchange.
    """

    instruction: str = "instruction"
    instances: str = "instances"

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """As many exchanges as there are instances."""
        instruction = _text(values, self.instruction, "instruction")
        instances = _value(values, self.instances, "instances")
        if not isinstance(instances, list | tuple) or not all(isinstance(item, Mapping) for item in instances):
            raise ValueError(f"column {self.instances!r} is {kind(instances)}, expected a list of {{input, output}}")
        return [
            Exchange(_with_input(instruction, item, "input"), _text(item, "output", "answer")) for item in instances
        ]


@dataclass(frozen=True)
class GSM8K(Layout):
    """A question and its worked answer, which ends in ``#### 18`` (arXiv 2110.14168).

    Args:
        question: Column with the question.
        answer: Column with the answer.
        cut_answer: Leave out ``####`` and what follows it.
    """

    question: str = "question"
    answer: str = "answer"
    cut_answer: bool = False

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """One exchange."""
        answer = _text(values, self.answer, "answer")
        if self.cut_answer:
            answer, mark, _ = answer.partition(ANSWER_MARK)
            if not mark:
                raise ValueError(
                    f"the answer in column {self.answer!r} has no {ANSWER_MARK!r} to be cut at; "
                    "write `cut_answer: false`"
                )
        return [Exchange(_text(values, self.question, "question"), answer.rstrip())]


@dataclass(frozen=True)
class Code(Layout):
    """A programming task, a solution, and the share of unit tests it passes, as in OpenCodeInstruct.

    Args:
        input: Column with the task.
        output: Column with the solution.
        score: Column with the share of tests passed, a number or its text.
        min_test_score: Rows below are left out; null keeps all, and needs no such column.
    """

    input: str = "input"
    output: str = "output"
    score: str = "average_test_score"
    min_test_score: float | None = 1.0

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """One exchange, or none."""
        if self.min_test_score is not None and self._score(values) < self.min_test_score:
            return []
        return [Exchange(_text(values, self.input, "task"), _text(values, self.output, "answer"))]

    def _score(self, values: Mapping[str, Any]) -> float:
        value = _value(values, self.score, "score")
        try:
            score = float(value)
            if math.isnan(score):
                raise ValueError("not a number")
            return score
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"the score in column {self.score!r} is {kind(value)} and no number; mend the row, or write "
                "`min_test_score: null`"
            ) from error


@dataclass(frozen=True)
class Chat(Layout):
    """A conversation that ends with the assistant; its last turn is the answer, all before it the prompt.

    Args:
        messages: Column with a list of ``{role, content}``.
    """

    messages: str = "messages"

    def exchanges(self, values: Mapping[str, Any]) -> list[Exchange]:
        """One exchange."""
        messages = _value(values, self.messages, "conversation")
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(
                f"the conversation in column {self.messages!r} is {kind(messages)}, expected a list of "
                "{role, content} messages"
            )
        last = messages[-1]
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            raise ValueError(
                f"the conversation in column {self.messages!r} does not end with a message of role 'assistant', which "
                "is the answer to imitate"
            )
        return [Exchange(list(messages[:-1]), _text(last, "content", "answer"))]


def _with_input(instruction: str, values: Mapping[str, Any], column: str) -> str:
    given = _text(values, column, "input") if values.get(column) is not None else ""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _value(values: Mapping[str, Any], column: str, what: str) -> Any:
    if column not in values:
        raise ValueError(missing_column(what, column, values))
    return values[column]


def _text(values: Mapping[str, Any], column: str, what: str) -> str:
    value = _value(values, column, what)
    if not isinstance(value, str):
        raise ValueError(f"the {what} in column {column!r} is {kind(value)}, expected a string")
    check_text(value)
    return value
