"""What the checks of constructors let through, and the words with which they refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest

from frpo.foundation import require

Kind = Literal["token", "sequence"]


@pytest.mark.parametrize(
    "accepted",
    [
        lambda: require.number("A.b", 0.0, at_least=0, below=1) == 0,
        lambda: require.number("A.b", 1.0, above=0, at_most=1) == 1,
        lambda: require.number("A.b", -3) == -3,
        lambda: require.number("A.b", 10**400, at_least=1) == 10**400,
        lambda: require.number("A.b", None, at_least=1) is None,
        lambda: require.number("A.b", math.inf, at_least=0, finite=False) == math.inf,
        lambda: require.seed("A.seed", 2**63 - 1) == 2**63 - 1,
        lambda: require.seed("A.seed", 0) == 0,
        lambda: require.one_of("A.b", "token", Kind) == "token",
        lambda: require.one_of("A.b", 2, {1: "x", 2: "y"}) == 2,
        lambda: require.one_of("A.b", None, Kind) is None,
        lambda: require.non_empty("A.b", ["x"]) == ["x"],
        lambda: require.non_empty("A.b", "x") == "x",
        lambda: require.non_empty("A.b", None) is None,
    ],
)
def test_what_is_expected_is_returned(accepted: Callable[[], bool]) -> None:
    """A value within the bounds, on them where they are inclusive, and one that was left out."""
    assert accepted()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: require.number("A.b", 0, at_least=1), "A.b: got 0, expected at least 1"),
        (lambda: require.number("A.b", 0.0, above=0), "A.b: got 0.0, expected more than 0"),
        (lambda: require.number("A.b", 1.0, at_least=0, below=1), "A.b: got 1.0, expected at least 0 and less than 1"),
        (lambda: require.number("A.b", 2, above=0, at_most=1), "A.b: got 2, expected more than 0 and at most 1"),
        (lambda: require.number("A.b", math.nan), "A.b: got nan, expected a finite number"),
        (lambda: require.number("A.b", math.inf, above=0), "A.b: got inf, expected a finite number, more than 0"),
        (lambda: require.number("A.b", -math.inf, at_most=0), "A.b: got -inf, expected a finite number, at most 0"),
        (lambda: require.number("A.b", math.nan, finite=False), "A.b: got nan, expected a number"),
        (
            lambda: require.number("A.b", 0, at_least=1, hint="write null"),
            "A.b: got 0, expected at least 1; write null",
        ),
        (lambda: require.seed("A.seed", -1), "A.seed: got -1, expected 0 to 2**63 - 1"),
        (lambda: require.seed("A.seed", 2**63), f"A.seed: got {2**63}, expected 0 to 2**63 - 1"),
        (lambda: require.one_of("A.b", "word", Kind), "A.b: got 'word', expected one of token, sequence"),
        (lambda: require.one_of("A.b", "z", {"x": 1, "y": 2}), "A.b: got 'z', expected one of x, y"),
        (lambda: require.non_empty("A.b", [], "name a source"), "A.b: got [], expected at least one; name a source"),
        (lambda: require.non_empty("A.b", " "), "A.b: got ' ', expected text"),
    ],
)
def test_what_is_not_expected_is_refused(refused: Callable[[], Any], message: str) -> None:
    """One line: the argument, what was got, what is expected, and the hint."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refused()
