"""Arguments that a constructor refuses: one ``ValueError`` each, that names what was got and what is expected.

Every function takes the argument's name as users know it (``"FRPO.lam"``), returns the value, and takes a ``hint`` that
ends the message: why, or what to write instead. None stands for an argument that was left out, and passes.

    self.steps = require.number("TinyPolicy.steps", steps, at_least=1)
"""

from __future__ import annotations

from collections.abc import Sized
from operator import ge, gt, le, lt
from typing import Any, TypeVar, get_args

Number = TypeVar("Number", bound=float | None)
Collection = TypeVar("Collection", bound=Sized | None)
Value = TypeVar("Value")

INFINITY = float("inf")


def number(
    name: str,
    value: Number,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    hint: str = "",
) -> Number:
    """``value`` if it lies within the bounds and, unless ``finite`` is False, is finite; never NaN."""
    if value is None:
        return value
    bounds = (("at least", at_least, ge), ("more than", above, gt), ("at most", at_most, le), ("less than", below, lt))
    given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    is_number = value == value and (not finite or abs(value) != INFINITY)
    if is_number and all(holds(value, bound) for _, bound, holds in given):
        return value
    expected = [] if is_number else ["a finite number" if finite else "a number"]
    if given:
        expected.append(" and ".join(f"{words} {bound}" for words, bound, _ in given))
    raise refusal(name, value, ", ".join(expected), hint)


def seed(name: str, value: int) -> int:
    """``value`` if it is a seed, 0 to 2**63 - 1."""
    if not 0 <= value < 2**63:
        raise refusal(name, value, "0 to 2**63 - 1")
    return value


def one_of(name: str, value: Value, choices: Any, hint: str = "") -> Value:
    """``value`` if it is one of ``choices``, a ``Literal`` or an iterable."""
    options = get_args(choices) or tuple(choices)
    if value is not None and value not in options:
        raise refusal(name, value, f"one of {', '.join(map(str, options))}", hint)
    return value


def non_empty(name: str, value: Collection, hint: str = "") -> Collection:
    """``value`` if it holds something; a text, more than white space."""
    if value is not None and not (value.strip() if isinstance(value, str) else len(value)):
        expected = "text" if isinstance(value, str) else "at least one"
        raise refusal(name, value, expected, hint)
    return value


def refusal(name: str, got: object, expected: str, hint: str = "") -> ValueError:
    """The error of an argument, for a check that is none of those above."""
    return ValueError(f"{name}: got {got!r}, expected {expected}" + (f"; {hint}" if hint else ""))
