"""A small tamper-resistance run on the random policy, shared by its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.data.preferences.sources import JudgedExample, JudgedSource
from frpo.models.policy import Policy
from frpo.models.reference import FrozenCopy
from frpo.tar.attacks import Attack
from frpo.tar.data import TamperDataModule
from frpo.tar.losses import DPO
from frpo.tar.module import TamperResistance
from frpo.types import Demonstration, Prompt


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + 3 * j) % 40}" for j in range(count))


def prompt(name: str, i: int) -> Prompt:
    return Prompt(f"{name}{i}", ({"role": "user", "content": words(i, 1 + i % 3)},), name)


class Rows(DemonstrationSource):
    """``n`` demonstrations with answers of one to four words that depend on ``name``."""

    def __init__(self, name: str, n: int = 40) -> None:
        self.name, self.n = name, n

    def demonstrations(self) -> list[Demonstration]:
        return [Demonstration(prompt(self.name, i), words(i + len(self.name), 1 + i % 4)) for i in range(self.n)]


class Pairs(JudgedSource):
    """``n`` pairs whose answers have different lengths."""

    responses = 2

    def __init__(self, n: int = 20) -> None:
        self.n = n

    def examples(self) -> list[JudgedExample]:
        return [
            JudgedExample(prompt("pair", i), (words(i, 1 + i % 2), words(i + 5, 1 + i % 4)), 0.0) for i in range(self.n)
        ]


def module(model_dir: Path, **changes: Any) -> TamperResistance:
    """Every weight trained in float64 with DPO, unless ``changes`` say otherwise."""
    arguments: dict[str, Any] = {
        "policy": Policy(str(model_dir), dtype="float64"),
        "loss": DPO(beta=0.5),
        "reference": FrozenCopy(),
        "lambda_tr": 0.7,
        "lambda_retain": 1.3,
        "lambda_distance": 0.2,
        "measure_every": 2,
        "micro_batch_size": 2,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    }
    return TamperResistance(**{**arguments, **changes})


def data(**changes: Any) -> TamperDataModule:
    """Two kinds of attack, two attacks a step, of 3 or 4 steps each."""
    arguments: dict[str, Any] = {
        "attacks": {
            "harmful": Attack(Rows("harmful"), learning_rates=[1e-2, 2e-2], steps=[3]),
            "benign": Attack(Rows("benign"), learning_rates=[1e-2], steps=[4]),
        },
        "safeguard": Pairs(),
        "train": Rows("retain"),
        "attacks_per_step": 2,
        "batch_size": 4,
        "max_length": 32,
    }
    return TamperDataModule(**{**arguments, **changes})
