"""What people or judges said of responses: pairs with a preferred one, and responses with a label."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from frpo.data.prompts.sources import PromptSource
from frpo.data.rows import kind, missing_column
from frpo.data.sources import Source
from frpo.types import Completion, Messages, Prompt


@dataclass(frozen=True)
class JudgedExample:
    """Responses to one prompt, and what was said of them.

    Two responses are a pair, the chosen one first, and ``target`` is the margin by which it should win. One response
    comes with its label or value.

    Example: ``JudgedExample(prompt, ("Paris.", "Rome."), target=0.0)``, ``JudgedExample(prompt, ("Paris.",), 1.0)``.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    target: float

    def completions(self) -> list[Completion]:
        """The responses as a reward sees them."""
        return [Completion(self.prompt, prompt_text=_text(self.prompt), text=text) for text in self.responses]


class JudgedSource(Source):
    """Rows for reward-model training. Constructors are cheap; files are read by :meth:`examples`."""

    responses: int
    """Responses per row: 2 for pairs, 1 for labelled responses."""

    @abstractmethod
    def examples(self) -> list[JudgedExample]:
        """The rows in their order."""


class Preferences(JudgedSource):
    """Preference pairs: prompts whose rows carry a chosen and a rejected response.

    A response is a string, or a list of ``{role, content}`` messages that ends with the assistant's; what stands before
    that one must be the prompt's messages.

    Args:
        source: The rows, :class:`~frpo.data.prompts.sources.FileSource` say.
        chosen: Column with the preferred response.
        rejected: Column with the other.
        margin: Column with the margin by which the chosen one should win, in units of score; null: 0.
    """

    responses = 2

    def __init__(
        self, source: PromptSource, chosen: str = "chosen", rejected: str = "rejected", margin: str | None = None
    ) -> None:
        self.source, self.chosen, self.rejected, self.margin = source, chosen, rejected, margin

    def prepare(self) -> None:
        """Let the source fetch what it reads."""
        self.source.prepare()

    def examples(self) -> list[JudgedExample]:
        """Read the pairs. Raises ``ValueError`` with the id of the first bad row."""
        return [self._example(prompt) for prompt in self.source.prompts()]

    def _example(self, prompt: Prompt) -> JudgedExample:
        pair = _response(prompt, self.chosen, "chosen"), _response(prompt, self.rejected, "rejected")
        if pair[0] == pair[1]:
            raise ValueError(
                f"row {prompt.id}: the responses in {self.chosen!r} and {self.rejected!r} are equal, so neither is "
                "preferred; drop the row"
            )
        return JudgedExample(prompt, pair, 0.0 if self.margin is None else _number(prompt, self.margin, "margin"))


class Labels(JudgedSource):
    """Labelled responses: prompts whose rows carry a response and its label or value.

    Args:
        source: The rows, :class:`~frpo.data.prompts.sources.FileSource` say.
        response: Column with the response: a string, or messages as in :class:`Preferences`.
        label: Column with a number: 0 or 1, or a value.
    """

    responses = 1

    def __init__(self, source: PromptSource, response: str = "response", label: str = "label") -> None:
        self.source, self.response, self.label = source, response, label

    def prepare(self) -> None:
        """Let the source fetch what it reads."""
        self.source.prepare()

    def examples(self) -> list[JudgedExample]:
        """Read the rows. Raises ``ValueError`` with the id of the first bad one."""
        return [
            JudgedExample(prompt, (_response(prompt, self.response, "response"),), _number(prompt, self.label, "label"))
            for prompt in self.source.prompts()
        ]


def _value(prompt: Prompt, column: str, what: str) -> Any:
    if column not in prompt.fields:
        raise ValueError(f"row {prompt.id}: {missing_column(what, column, prompt.fields)}")
    return prompt.fields[column]


def _response(prompt: Prompt, column: str, what: str) -> str:
    value = _value(prompt, column, what)
    if isinstance(value, str):
        text = value
    else:
        text = _last_turn(value, prompt.messages, f"row {prompt.id}, column {column!r}")
    if not text.strip():
        raise ValueError(f"row {prompt.id}: the response in column {column!r} is empty; drop the row or fill it in")
    return text


def _last_turn(value: Any, prompt: Messages, where: str) -> str:
    if not isinstance(value, Sequence) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError(
            f"{where}: the response is {kind(value)}; expected a string or a list of {{role, content}} messages that "
            "ends with the assistant's"
        )
    *before, last = ((message.get("role"), message.get("content")) for message in value)
    if last[0] != "assistant" or not isinstance(last[1], str):
        raise ValueError(
            f"{where}: the last message has role {last[0]!r} and {kind(last[1])} as content; expected the assistant's "
            "with a string"
        )
    asked = [(message["role"], message["content"]) for message in prompt]
    if before and before not in (asked, [turn for turn in asked if turn[0] != "system"]):
        raise ValueError(
            f"{where}: the {len(before)} messages before the response are not those of the prompt; both responses must "
            "answer the prompt of the row"
        )
    return last[1]


def _number(prompt: Prompt, column: str, what: str) -> float:
    value = _value(prompt, column, what)
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else None
    except (ValueError, OverflowError) as error:
        found = "text" if isinstance(value, str) else "too large"
        raise ValueError(f"row {prompt.id}: the {what} in column {column!r} is {found}, expected a number") from error
    if number is not None and math.isfinite(number):
        return number
    raise ValueError(f"row {prompt.id}: the {what} in column {column!r} is {kind(value)}, expected a finite number")


def _text(prompt: Prompt) -> str:
    """The messages without a template, for a reward that reads the prompt as text."""
    return "".join(f"{message['content']}\n" for message in prompt.messages)
