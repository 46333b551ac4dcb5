"""One row of a table: checked and turned into the parts of a prompt. No input or output here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from frpo.foundation.errors import nearest
from frpo.types import Messages

MAX_NAME = 40  # characters of a column name or task shown in a message
MAX_DEPTH = 64  # of a nested value; deeper rows are damaged or hostile, and recursion has a limit


@dataclass(frozen=True)
class Row:
    """A row as read: its columns, and where it stands in the file (``line 7``) for messages about it."""

    place: str
    values: Mapping[str, Any]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or nothing."""
    close = nearest(name, known, limit=1)
    return f" Did you mean {clip(close[0])!r}?" if close else ""


def missing_column(kind: str, name: str, columns: Iterable[str]) -> str:
    """The words for an absent column: what is there, and the nearest name."""
    columns = sorted(columns)
    found = [clip(column) for column in columns]
    return f"no column {name!r} (the {kind} column); the columns are {found}.{did_you_mean(name, columns)}"


def clip(name: str) -> str:
    """A name cut to be shown: a table without a header has texts where its names should be."""
    return name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."


def read_messages(value: Any, system: str | None) -> Messages:
    """Read a prompt: a string (one user message) or a list of ``{role, content}`` that ends before the answer.

    Other keys of a message are left out. Raises ``ValueError`` with the reason, without the text.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            f"the prompt is {kind(value)}; expected a string or a non-empty list of "
            "{'role': ..., 'content': ...} messages"
        )
    messages = tuple(_message(number, message) for number, message in enumerate(value, start=1))
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "the last message of the prompt has role 'assistant'; expected one for the model to answer: "
            "drop the answer from the prompt"
        )
    if system is None:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise ValueError(
            "the prompt has a system message of its own and `system` is set; set `system: null` "
            "or take the message out of the row"
        )
    return ({"role": "system", "content": system}, *messages)


def _message(number: int, message: Any) -> Mapping[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} of the prompt is {kind(message)}; expected {{role, content}}")
    role, content = message.get("role"), message.get("content")
    for key, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            raise ValueError(
                f"message {number} of the prompt has {kind(text)} for {key!r}; expected a string "
                f"(its keys are {sorted(clip(str(key)) for key in message)})"
            )
        if not text.strip():
            raise ValueError(f"message {number} of the prompt has an empty {key!r}; drop the row or fill it in")
        check_text(text)
    return {"role": str(role), "content": str(content)}


def check_text(text: str) -> None:
    """Refuse a string that UTF-8 cannot hold (half of a surrogate pair): no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a string holds half of a surrogate pair at character {error.start}, which UTF-8 cannot "
            "write; repair the escape (\\ud83d needs its second half) or drop the row"
        ) from error


def json_value(value: Any, depth: int = 0) -> Any:
    """The value with JSON types alone: dates and decimals as strings, a NaN (a missing number) as None.

    Raises ``ValueError`` for what JSON cannot hold: bytes, infinities, other objects, deep nesting.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        check_text(value)
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"the value is {value}; expected a finite number")
        return None if math.isnan(value) else value
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {json_value(str(key)): json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, depth + 1) for item in value]
    raise ValueError(f"the value is {kind(value)}; expected a JSON type: drop the column from the data or convert it")


def kind(value: Any) -> str:
    """What a value is, for messages, without showing it: ``null``, ``an int``, ``a list of 3``."""
    if value is None:
        return "null"
    name = type(value).__name__
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}{size}"
