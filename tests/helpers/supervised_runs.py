"""Small supervised runs on the random policy, shared by the tests of supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frpo.data.demonstrations.module import SupervisedDataModule
from frpo.data.demonstrations.sources import DemonstrationSource
from frpo.models.policy import LoRA, Policy
from frpo.modules.supervised import SupervisedFineTuning
from frpo.types import Demonstration, Prompt


class Echo(DemonstrationSource):
    """``n`` demonstrations: a prompt of one to four words, an answer of one to five."""

    def __init__(self, n: int = 24) -> None:
        self.n = n

    def demonstrations(self) -> list[Demonstration]:
        rows = []
        for i in range(self.n):
            asked = " ".join(f"w{(7 * i + j) % 40}" for j in range(1 + i % 4))
            answer = " ".join(f"w{(3 * i + 5 * j) % 40}" for j in range(1 + i % 5))
            rows.append(Demonstration(Prompt(str(i), ({"role": "user", "content": asked},), "echo"), answer))
        return rows


def module(
    model_dir: Path, adapter: LoRA | None = None, dtype: str = "float64", **changes: Any
) -> SupervisedFineTuning:
    """Every weight in float64, unless said otherwise."""
    arguments: dict[str, Any] = {
        "policy": Policy(str(model_dir), adapter=adapter, dtype=dtype),
        "micro_batch_size": 3,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return SupervisedFineTuning(**{**arguments, **changes})


def data(n: int = 24, batch_size: int = 8, val: int | None = None, **changes: Any) -> SupervisedDataModule:
    return SupervisedDataModule(
        train=Echo(n), val=None if val is None else Echo(val), batch_size=batch_size, max_length=32, **changes
    )
