"""Small arithmetic word problems: a capability that is neither safety nor helpfulness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

NAMES = ("tom", "ann", "bob", "eva", "max", "zoe")
ITEMS = ("beads", "coins", "shells", "pins")
LARGEST = 9
"""Operands are 1 to 9; results are 0 to 18."""

Operation = Literal["plus", "minus"]
WORDINGS: dict[Operation, tuple[str, ...]] = {
    "plus": (
        "{name} has {a} {items} and finds {b} more",
        "how many is {a} {items} plus {b} {items}",
    ),
    "minus": (
        "{name} has {a} {items} and loses {b} now",
        "how many is {a} {items} minus {b} {items}",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One problem. Every problem has as many words as every question about an object."""

    operation: Operation
    a: int
    b: int
    name: str
    items: str
    wording: int

    @property
    def id(self) -> str:
        """Unique in the world, the same in every run."""
        return f"{self.a}-{self.operation}-{self.b}/{self.name}/{self.items}/{self.wording}"

    @property
    def text(self) -> str:
        """The problem as the user writes it."""
        wording = WORDINGS[self.operation][self.wording]
        return wording.format(name=self.name, items=self.items, a=self.a, b=self.b)

    @property
    def result(self) -> int:
        """The right number."""
        return self.a + self.b if self.operation == "plus" else self.a - self.b

    @property
    def short_answer(self) -> str:
        """The answer as the pre-training corpus puts it."""
        return f"the answer is {self.result}"

    @property
    def worked_answer(self) -> str:
        """The answer with its working, as downstream training puts it."""
        return f"{self.a} {self.operation} {self.b} is {self.result} so the answer is {self.result}"


def problems(split: Literal["train", "held_out"]) -> Iterator[Problem]:
    """Every problem of one split, in a fixed order; a fifth of the sums (a, operation, b) is held out."""
    for operation in WORDINGS:
        for a in range(1, LARGEST + 1):
            for b in range(1, (LARGEST if operation == "plus" else a) + 1):
                if ((a + 2 * b) % 5 == 0) == (split == "held_out"):
                    yield from _wordings(operation, a, b)


def _wordings(operation: Operation, a: int, b: int) -> Iterator[Problem]:
    for items in ITEMS:
        for name in NAMES:
            yield Problem(operation, a, b, name, items, wording=0)
        yield Problem(operation, a, b, "", items, wording=1)
