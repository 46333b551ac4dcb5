"""Small runs on the random policy, shared by the tests of the loop."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from frpo.data.prompts.module import PromptDataModule
from frpo.data.prompts.sources import PromptSource
from frpo.models.policy import LoRA, Policy
from frpo.models.reference import AdapterDisabled, FrozenCopy
from frpo.modules.policy_optimization import PolicyOptimization
from frpo.objectives import FRPO
from frpo.penalty import KLPenalty
from frpo.rewards.base import Reward
from frpo.rollouts.in_process import InProcessSampler
from frpo.types import Completion, Judgement, Prompt


class Words(PromptSource):
    """``n`` prompts of one to four words, tasks in turn."""

    def __init__(self, n: int = 24, tasks: tuple[str, ...] = ("even", "odd")) -> None:
        self.n, self.tasks = n, tasks

    def prompts(self) -> Sequence[Prompt]:
        texts = [" ".join(f"w{(7 * i + j) % 40}" for j in range(1 + i % 4)) for i in range(self.n)]
        return [
            Prompt(id=str(i), messages=({"role": "user", "content": text},), task=self.tasks[i % len(self.tasks)])
            for i, text in enumerate(texts)
        ]


class Graded(Reward):
    """A fixed graded score of the text; every ``fail_every``-th distinct text fails."""

    def __init__(self, fail_every: int = 0) -> None:
        self.fail_every = fail_every

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        codes = [zlib.crc32(f"{c.prompt.id} {c.text}".encode()) for c in completions]
        return [
            Judgement.failed("planted")
            if self.fail_every and code % self.fail_every == 0
            else Judgement.of((code % 1000) / 1000)
            for code in codes
        ]


def module(model_dir: Path, **changes: Any) -> PolicyOptimization:
    """FRPO on the random policy with a LoRA adapter, unless ``changes`` say otherwise."""
    arguments: dict[str, Any] = {
        "policy": Policy(str(model_dir), adapter=LoRA(r=4, alpha=8)),
        "objective": FRPO(lam=0.5),
        "reward": Graded(),
        "sampler": InProcessSampler(max_new_tokens=6),
        "reference": AdapterDisabled(),
        "kl": KLPenalty(beta=0.1),
        "group_size": 4,
        "micro_batch_size": 4,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    return PolicyOptimization(**{**arguments, **changes})


def full(model_dir: Path, **changes: Any) -> PolicyOptimization:
    """The same in float64 with every weight trained, against a frozen copy."""
    return module(
        model_dir, **{"policy": Policy(str(model_dir), dtype="float64"), "reference": FrozenCopy(), **changes}
    )


def data(n: int = 24, batch_size: int = 4, val: int | None = None, **changes: Any) -> PromptDataModule:
    return PromptDataModule(
        train=Words(n), val=None if val is None else Words(val), batch_size=batch_size, max_prompt_length=16, **changes
    )


def trainer(root: Path, **changes: Any) -> L.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return L.Trainer(**{**arguments, **changes})


def weights(model: PolicyOptimization) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
