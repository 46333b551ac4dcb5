"""The exact KL of the policy to frozen models along the policy's completions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frpo.functional.logprobs import token_full_kl
from frpo.models.policy import Policy
from frpo.modules.micro_batches import completion_logits, micro_batches
from frpo.types import RolloutBatch


@torch.no_grad()
def sequence_kl(model: Any, frozen: Any, rollout: RolloutBatch, micro_batch_size: int) -> Tensor:
    r"""KL(policy || frozen) summed over the tokens of each completion, float64 [P, G], in nats per completion.

    .. math:: \sum_{t=1}^{T_i} \sum_v \pi(v | s_t) [\log \pi(v | s_t) - \log \pi_0(v | s_t)]

    with the prefixes s_t of the completion. Over the whole vocabulary, at temperature 1 and uncut, however the
    completion was drawn. With completions drawn at temperature 1 its mean is the KL of the two distributions of
    completions (chain rule, up to the length limit); along greedy completions it is that of the single path. ``model``
    must be in eval mode.
    """
    P, G, _ = rollout.mask.shape
    total = torch.zeros(P * G, dtype=torch.float64, device="cpu")
    for batch in micro_batches(rollout, micro_batch_size):
        tokens = token_full_kl(completion_logits(model, batch), completion_logits(frozen, batch))
        total[batch.rows.cpu()] = torch.where(batch.mask, tokens, 0).cpu().double().sum(-1)
    return total.view(P, G)


class FrozenModels:
    """Loads each frozen model once, whichever suites name it."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def load(self, path: str, policy: Policy | None, model: Any, device: torch.device) -> Any:
        """The frozen model of ``path`` on ``device``, in the policy's dtype.

        Raises:
            ValueError: it cannot be loaded, or its vocabulary is not that of the policy's ``model``.
        """
        if path not in self._loaded:
            try:
                frozen = (Policy(path) if policy is None else policy).load_base(path)
            except ValueError as error:
                raise ValueError(f"kl_to: {error}") from error
            size, expected = frozen.config.vocab_size, model.config.vocab_size
            if size != expected:
                raise ValueError(
                    f"kl_to: {path!r} has a vocabulary of {size}, the policy one of {expected}; their KL is defined "
                    "over one vocabulary: choose a model of the policy's family"
                )
            self._loaded[path] = frozen.requires_grad_(False).eval().to(device)
        return self._loaded[path]

    def __getitem__(self, path: str) -> Any:
        return self._loaded[path]

    def clear(self) -> None:
        """Let go of the models, and of their memory."""
        self._loaded.clear()
