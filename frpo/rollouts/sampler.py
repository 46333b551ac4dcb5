"""The Sampler protocol: prompts in, groups of completions out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from frpo.foundation import require
from frpo.types import PromptBatch, RolloutBatch


class Sampler(ABC):
    """Draws completions from ``softmax(logits / temperature)``, cut to the top-k and then to the nucleus.

    Cutting changes the policy that acts: log-probabilities are those of the cut distribution, here and in training.

    Args:
        max_new_tokens: limit of a completion, T; one that reaches it without an end-of-sequence token is truncated.
        temperature: > 0; 0 takes the most probable token (validation only).
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        top_k: number of tokens kept; null keeps all.
    """

    def __init__(
        self, max_new_tokens: int = 256, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None
    ) -> None:
        name = type(self).__name__
        self.max_new_tokens = require.number(f"{name}.max_new_tokens", max_new_tokens, at_least=1)
        self.temperature = require.number(
            f"{name}.temperature", temperature, at_least=0, hint="1.0 samples the policy itself"
        )
        self.top_p = require.number(f"{name}.top_p", top_p, above=0, at_most=1, hint="1.0 keeps every token")
        self.top_k = require.number(f"{name}.top_k", top_k, at_least=1, hint="null keeps every token")

    @property
    def truncates(self) -> bool:
        """Whether tokens are cut before sampling."""
        return self.top_p < 1 or self.top_k is not None

    @abstractmethod
    def sample(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompts: PromptBatch, *, group_size: int, seed: int
    ) -> RolloutBatch:
        """``group_size`` completions of each prompt.

        The noise is a function of ``seed`` and each prompt's ``position`` alone: the same completions come out whatever
        the batch, the number of processes, or the state of any random generator.
        """


def uniform_noise(seed: int, position: Tensor, group_size: int, tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) keyed by ``(seed, position)``: position int64 [P] -> float64 [P, G, T], on the CPU."""
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, int(p))))).random((group_size, tokens))
        for p in position.tolist()
    ]
    return torch.from_numpy(np.stack(rows))
