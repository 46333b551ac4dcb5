"""A policy that is evaluated and not trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from frpo.models.checkpoint import LoadedPolicy
from frpo.models.policy import Policy
from frpo.modules.strategy import check_whole_evaluation


class EvaluatedPolicy(L.LightningModule):
    """Holds a policy for the callback :class:`~frpo.evaluation.callback.Evaluation`; ``trainer.test(module)`` runs it.

    Args:
        policy: the model; null where :meth:`take` gives the policy of a checkpoint.
        seed: of what the model has no weights for: a fresh adapter.

    ``step`` is the number of optimiser steps the policy was trained for: 0, or the checkpoint's.
    """

    policy_model: Any

    def __init__(self, policy: Policy | None = None, seed: int = 0) -> None:
        super().__init__()
        self.description, self.seed = policy, seed
        self.policy_model = None
        self.step = 0

    def take(self, loaded: LoadedPolicy) -> None:
        """Evaluate the policy of a checkpoint."""
        self.description, self.policy_model, self.step = loaded.policy, loaded.model, loaded.step

    @property
    def policy(self) -> Policy:
        """The description of the model.

        Raises:
            ValueError: neither a policy nor a checkpoint was given.
        """
        if self.description is None:
            raise ValueError(
                "EvaluatedPolicy: got no policy; give a model by --model.policy.path DIR, or the checkpoint of a run "
                "by --ckpt_path FILE"
            )
        return self.description

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; reading it loads no weights."""
        return self.policy.tokenizer

    def prepare_data(self) -> None:
        """Make the policy's files exist, once a node."""
        self.policy.prepare()

    def setup(self, stage: str) -> None:
        """Refuse a strategy under which the policy would not be whole."""
        check_whole_evaluation(self.trainer)

    def configure_model(self) -> None:
        """Load the policy where no checkpoint gave it."""
        if self.policy_model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.policy_model = self.policy.load()

    def test_dataloader(self) -> Once:
        """A single empty batch: the callback has the prompts."""
        return Once()

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Nothing: the callback has evaluated before the first batch."""


class Once:
    """A loader of one batch that says nothing."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        return iter((0,))
