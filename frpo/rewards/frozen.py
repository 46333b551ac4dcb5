"""Rewards that run a frozen model of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch

from frpo.foundation import require
from frpo.models.loading import reading
from frpo.rewards.base import Reward
from frpo.types import Completion, Judgement

Dtype = Literal["float32", "bfloat16", "float16"]


class FrozenModel(Reward):
    """Encodes each completion as a row of token ids and scores rows in batches, longest with longest.

    Args:
        path: directory or hub id of the model.
        revision: commit, tag or branch on the hub.
        dtype: of the weights. Autocast is off whatever it is.
        batch_size: rows per forward pass.
    """

    reads: str
    """What ``path`` must hold."""

    def __init__(self, path: str, revision: str | None, dtype: Dtype, batch_size: int) -> None:
        name = type(self).__name__
        self.path, self.revision = path, revision
        self.dtype = require.one_of(f"{name}.dtype", dtype, Dtype)
        self.batch_size = require.number(f"{name}.batch_size", batch_size, at_least=1)
        self._model: Any = None

    @abstractmethod
    def load(self) -> Any:
        """The model, and whatever else scoring needs; ``ValueError`` where it cannot judge."""

    @abstractmethod
    def encode(self, completion: Completion) -> list[int] | Judgement:
        """The ids to run the model on, or the judgement of a completion that it need not or cannot read."""

    @abstractmethod
    def score(self, rows: list[list[int]]) -> list[Judgement]:
        """One judgement per row of ids; gradients and autocast are off."""

    def setup(self, device: torch.device) -> None:
        """Load the model onto ``device``; again, only move it.

        Raises:
            ValueError: the model or its tokenizer cannot be read, or cannot judge.
        """
        if self._model is None:
            with reading(self.path, self.reads):
                self._model = self.load().eval().requires_grad_(False)
        self._model.to(device)

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        """Judge each completion."""
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__}: called before setup(device), which loads the model")
        judgements: dict[int, Judgement] = {}
        rows: dict[int, list[int]] = {}
        for i, completion in enumerate(completions):
            encoded = self.encode(completion)
            if isinstance(encoded, Judgement):
                judgements[i] = encoded
            else:
                rows[i] = encoded
        order = sorted(rows, key=lambda i: -len(rows[i]))
        with torch.inference_mode(), torch.autocast(self._model.device.type, enabled=False):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                judgements.update(zip(batch, self.score([rows[i] for i in batch]), strict=True))
        return [judgements[i] for i in range(len(completions))]

    def require_weights(self, missing: Sequence[str], path: str) -> None:
        """Refuse the model at ``path`` where its files hold no weights for the names in ``missing``."""
        if missing:
            raise ValueError(
                f"{type(self).__name__}: {path!r} holds no weights for {sorted(missing)[:3]}, so its judgements would "
                f"be random; expected a trained {self.reads}"
            )
